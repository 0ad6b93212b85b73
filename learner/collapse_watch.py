"""A warning before a run collapses: KL to the reference and entropy that rise together (pure, without torch).

Entropy normally falls while the policy learns and the KL normally grows. In the published soft-token runs that ended in
a collapse both rose for tens of steps before the reward fell (KL .009 to .028, entropy .39 to .50).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import fmean

WINDOW = 30
"""Steps that are compared: the first third against the last third."""
KL_GROWTH = 1.5
ENTROPY_GROWTH = 1.15
"""Factors between the thirds; either alone is ordinary."""
PARTS = ("thinking", "answer")


class CollapseWatch:
    """Feed it the metrics of every training step; it answers with a warning once per `window` steps at most."""

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window
        self._history: deque[tuple[float, float]] = deque(maxlen=window)

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        """The warning, or None. Steps without a KL (no reference policy) are not counted."""
        kl, entropy = (_mean_over_positions(metrics, name) for name in ("kl", "entropy"))
        if not kl or entropy is None:
            return None
        self._history.append((kl, entropy))
        if len(self._history) < self.window:
            return None
        third = max(1, self.window // 3)
        steps = list(self._history)
        (kl_before, entropy_before), (kl_after, entropy_after) = (
            tuple(fmean(column) for column in zip(*part, strict=True)) for part in (steps[:third], steps[-third:])
        )
        # Signed estimates (k1) may be below 0 on average: growing there is falling.
        if kl_after <= 0 or kl_after < KL_GROWTH * max(kl_before, 0.0):
            return None
        if entropy_after < ENTROPY_GROWTH * entropy_before:
            return None
        self._history.clear()
        return (
            f"KL and entropy rise together over {self.window} steps (KL {kl_before:.4f} to {kl_after:.4f}, entropy "
            f"{entropy_before:.3f} to {entropy_after:.3f}): this preceded the published collapses. Lower "
            "learner.learning_rate, raise algorithm.kl.coefficient, or use likelihood: censored"
        )


def _mean_over_positions(metrics: Mapping[str, float], name: str) -> float | None:
    """Mean over thinking and answer positions, weighted by how many there are."""
    counts = {part: metrics.get(f"objective/positions_{part}", 0.0) for part in PARTS}
    total = sum(counts.values())
    if not total:
        return None
    return sum(metrics[f"objective/{name}_{part}"] * count for part, count in counts.items() if count) / total
