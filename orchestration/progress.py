"""What a person sees of a run: a bar on a terminal, one line per step elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

logger = logging.getLogger(__name__)


class Progress:
    """Steps done, with reward, staleness and tokens/s."""

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
    """The numbers that say at a glance whether a run is healthy."""
    return (
        f"reward {metrics['reward/mean']:.3f}  length {metrics['rollout/length_mean']:.1f}  "
        f"staleness {metrics['staleness/mean']:.1f} (max {metrics['staleness/max']:.0f})  "
        f"{metrics['throughput/tokens_per_s']:.0f} tokens/s  learner idle {metrics['idle/learner']:.0%}"
    )
