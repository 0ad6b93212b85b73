"""What one training step says about itself: sums over positions that add up over passes and ranks, then metrics.

Thinking positions are the soft ones and the end of thinking; answer positions are the discrete ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

PARTS = ("thinking", "answer")
_PART_SUMS = (
    "count",
    "clipped",
    "ratio",
    "ratio_squared",
    "entropy",
    "kl",
    "gap",
    "gap_kl",
    "weight",
    "weight_squared",
)
_SOFT_SUMS = ("soft_count", "active_candidates", "top_weight", "single_candidate")
_LOSS_SUMS = ("policy_loss", "kl_loss", "entropy_loss", "importance_weight")

SUMS = tuple(f"{part}/{name}" for part in PARTS for name in _PART_SUMS) + _SOFT_SUMS + _LOSS_SUMS
MAXIMA = ("ratio_max", *(f"{part}/gap_max" for part in PARTS))


@dataclass(frozen=True)
class Statistics:
    """Of some positions: `sums` [len(SUMS)] and `maxima` [len(MAXIMA)], fp64; all-reduce them with SUM and MAX."""

    sums: Tensor
    maxima: Tensor

    @staticmethod
    def of(values: dict[str, Tensor]) -> Statistics:
        """From named scalars; names that are absent are 0."""
        unknown = values.keys() - set(SUMS) - set(MAXIMA)
        if unknown:
            raise KeyError(f"not a statistic: {', '.join(sorted(unknown))}")
        device = next(iter(values.values())).device if values else torch.device("cpu")
        zero = torch.zeros((), dtype=torch.float64, device=device)
        scalars = {name: value.detach().to(torch.float64) for name, value in values.items()}
        return Statistics(
            torch.stack([scalars.get(name, zero) for name in SUMS]),
            torch.stack([scalars.get(name, zero) for name in MAXIMA]),
        )

    @staticmethod
    def empty(device: torch.device | str = "cpu") -> Statistics:
        """Of no positions."""
        return Statistics(
            torch.zeros(len(SUMS), dtype=torch.float64, device=device),
            torch.zeros(len(MAXIMA), dtype=torch.float64, device=device),
        )

    @staticmethod
    def merged(parts: Iterable[Statistics], device: torch.device | str = "cpu") -> Statistics:
        """Of all the positions of several passes."""
        total = Statistics.empty(device)
        for part in parts:
            total = Statistics(total.sums + part.sums, torch.maximum(total.maxima, part.maxima))
        return total

    def metrics(self) -> dict[str, float]:
        """`area/name` -> value; a part without positions has no entry. One host synchronisation."""
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        maxima = dict(zip(MAXIMA, self.maxima.tolist(), strict=True))
        result = {f"objective/{name}": sums[name] for name in ("policy_loss", "kl_loss", "entropy_loss")}
        result["objective/ratio_max"] = maxima["ratio_max"]
        total = sum(sums[f"{part}/count"] for part in PARTS)
        for part in PARTS:
            count = sums[f"{part}/count"]
            if not count:
                continue
            mean = {name: sums[f"{part}/{name}"] / count for name in _PART_SUMS}
            result |= {
                f"objective/clip_fraction_{part}": mean["clipped"],
                f"objective/ratio_mean_{part}": mean["ratio"],
                f"objective/effective_sample_size_{part}": _effective(mean["ratio"], mean["ratio_squared"]),
                f"objective/entropy_{part}": mean["entropy"],
                f"objective/kl_{part}": mean["kl"],
                f"mismatch/log_ratio_mean_{part}": mean["gap"],
                f"mismatch/kl_{part}": mean["gap_kl"],
                f"mismatch/max_{part}": maxima[f"{part}/gap_max"],
                f"mismatch/effective_sample_size_{part}": _effective(mean["weight"], mean["weight_squared"]),
                f"objective/positions_{part}": count,
            }
        if total:
            result["objective/importance_weight"] = sums["importance_weight"] / total
        if sums["soft_count"]:
            for name in ("active_candidates", "top_weight", "single_candidate"):
                result[f"soft/{name}"] = sums[name] / sums["soft_count"]
        return result


def _effective(mean: float, mean_square: float) -> float:
    """(sum w)^2 / (n sum w^2): 1 where all weights are equal."""
    return mean**2 / mean_square if mean_square else 0.0
