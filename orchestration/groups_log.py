"""`groups.jsonl`: which groups every step trained, for audits of a run (exactly once, nothing lost) after the fact.

One line per trained step, in the order of training: {"step": 3, "version": 4, "attempt": 1, "trained": ["p7@0", ...]}.
`version` is what the step was published as, a group is `prompt@visit`. A step that is repeated, after a resume or the
learner's death, appends again: the last line of a step counts. A line is written before the step's checkpoint is begun,
so whatever a checkpoint contains is here, however the process ends; a checkpoint also has it synced.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestration.metrics_log import LineFile, complete_lines

GROUPS = "groups.jsonl"


class GroupsLog:
    """Appends to the file of one run directory; a full disk delays lines, never a step."""

    def __init__(self, run_dir: Path, *, attempt: int) -> None:
        self._lines = LineFile(run_dir / GROUPS)
        self._attempt = attempt

    def append(self, step: int, version: int, trained: Iterable[str]) -> None:
        """The groups that training step `step` consumed, by id."""
        self._lines.add({"step": step, "version": version, "attempt": self._attempt, "trained": list(trained)})

    def sync(self) -> None:
        """Have all lines on disk (a checkpoint calls this)."""
        self._lines.sync()

    def close(self) -> None:
        """Write what is left and stop."""
        self._lines.add({})
        self._lines.close()


def read_groups(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The record of every step, by step: the last one where a step was repeated."""
    path = run_dir / GROUPS
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        return {record["step"]: record for _, record in complete_lines(file) if record}
