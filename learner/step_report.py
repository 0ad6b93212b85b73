"""What a training step reports: statistics of its positions, and the time and memory of its passes, over all ranks."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from learner.diagnostics import Statistics

MEBIBYTE = 2**20


@dataclass
class OptimizerStep:
    """One optimiser step on one rank."""

    device: str
    statistics: list[Statistics] = field(default_factory=list)
    """Of the passes that train; a pass that only keeps the ranks in step has none."""
    pass_s: list[float] = field(default_factory=list)
    """Forward and backward of every pass."""
    pass_memory_mb: list[float] = field(default_factory=list)
    """On a GPU the most that torch had allocated during the pass, on a CPU the resident set after it."""
    grad_norm: float = 0.0
    """Over all ranks, before clipping."""
    skipped: bool = False
    """The gradients were not finite."""

    @contextmanager
    def measured_pass(self) -> Iterator[None]:
        """Measure what happens inside as one pass."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.pass_s.append(time.perf_counter() - began)
        self.pass_memory_mb.append(memory_in_use(self.device))


def memory_in_use(device: str) -> float:
    """MiB: the peak of torch's allocations since it was last reset, or the resident set of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MEBIBYTE
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE
    except OSError:  # not Linux: the largest resident set so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step_metrics(
    steps: Sequence[OptimizerStep], times: dict[str, float], *, mismatch_from_first: bool, device: str
) -> dict[str, float]:
    """Metrics of a training step, the same on every rank: statistics are summed over ranks, times and memory are the
    slowest's and the largest's. Collective.

    `mismatch_from_first`: later optimiser steps had no scores of the policy before the step, so that their gap to the
    engine would include the update. Where the first step had no positions there is no gap to report.
    """
    metrics = _position_metrics(steps, device)
    if mismatch_from_first:
        first = _position_metrics(steps[:1], device)
        metrics = {name: value for name, value in metrics.items() if not name.startswith("mismatch/")}
        metrics |= {name: value for name, value in first.items() if name.startswith("mismatch/")}
    for name in ("policy_loss", "kl_loss", "entropy_loss"):
        metrics[f"objective/{name}"] /= len(steps)
    seconds = [value for step in steps for value in step.pass_s]
    worst = {
        **times,
        "learner/pass_s_max": max(seconds),
        "learner/pass_memory_mb_max": max(value for step in steps for value in step.pass_memory_mb),
    }
    norms = [step.grad_norm for step in steps if not step.skipped]
    return {
        **metrics,
        **_largest_over_ranks(worst, device),
        "learner/pass_s_mean": sum(seconds) / len(seconds),
        "learner/passes": float(len(seconds)),
        "learner/grad_norm": sum(norms) / len(norms) if norms else 0.0,
        "learner/grad_norm_max": max(norms, default=0.0),
        "learner/optimizer_steps": float(len(norms)),
        "learner/skipped_steps": float(len(steps) - len(norms)),
    }


def _position_metrics(steps: Sequence[OptimizerStep], device: str) -> dict[str, float]:
    import torch.distributed as dist

    total = Statistics.merged((part for step in steps for part in step.statistics), device)
    dist.all_reduce(total.sums, dist.ReduceOp.SUM)
    dist.all_reduce(total.maxima, dist.ReduceOp.MAX)
    return total.metrics()


def _largest_over_ranks(values: dict[str, float], device: str) -> dict[str, float]:
    import torch.distributed as dist

    largest = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return dict(zip(values, largest.tolist(), strict=True))
