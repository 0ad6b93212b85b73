"""What a person sees of a run: a bar on a terminal, one line per step elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

logger = logging.getLogger(__name__)

POOLS = ("rollout", "verifier", "learner")
"""In the order in which a group passes them."""


class Progress:
    """Steps done, with the line of `status_line`."""

    def __init__(self, name: str, step: int, total: int) -> None:
        self._total = total
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(name, total=total, completed=step, status="starting")
            self._bar.start()

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        """One more step is done."""
        status = status_line(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        else:
            logger.info("step %d/%d  %s", step, self._total, status)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()


def status_line(metrics: Mapping[str, float]) -> str:
    """The numbers that say at a glance whether a run is healthy; trouble is named only when there is any."""
    parts = [
        f"reward {metrics['reward/mean']:.3f}",
        f"length {metrics['rollout/length_mean']:.1f}",
        f"staleness {metrics['staleness/mean']:.1f} (max {metrics['staleness/max']:.0f})",
        f"{metrics['throughput/tokens_per_s']:.0f} tokens/s",
        "idle " + " ".join(f"{pool} {metrics[f'idle/{pool}']:.0%}" for pool in POOLS),
        "queued " + "/".join(f"{metrics[f'queue/{pool}']:.0f}" for pool in POOLS),
    ]
    restarts = sum(metrics.get(f"failures/{pool}_restarts", 0) for pool in POOLS)
    dropped = sum(count for name, count in metrics.items() if name.startswith("groups/dropped"))
    parts += [f"{count:.0f} {what}" for count, what in ((restarts, "restarts"), (dropped, "dropped")) if count]
    return "  ".join(parts)
