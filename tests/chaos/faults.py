"""Faults for real runs: who to hit, with what, and what must hold afterwards."""

from __future__ import annotations

import signal
from collections import Counter

from orchestration.run_state import load_state
from tests.end_to_end.recipes import Run


def hit(run: Run, title: str, number: signal.Signals = signal.SIGKILL, which: int = 0) -> int:
    """Send a signal to one worker process of the run; returns its pid."""
    process = run.actors(title)[which]
    process.send_signal(number)
    return int(process.pid)


def wait_for_replacement(run: Run, title: str, dead: int, count: int) -> None:
    """Until `count` processes of this class run and none of them is the dead one."""

    def replaced() -> bool:
        pids = [process.pid for process in run.actors(title)]
        return len(pids) >= count and dead not in pids

    run.wait_until(replaced, f"a replacement of {title}")


def balanced(run: Run, steps: int, groups_per_step: int) -> dict[str, int]:
    """The ledger of a finished run: every step trained a full batch, every group ended once; returns the counts."""
    state = load_state(run.run_dir / "checkpoints" / f"step_{steps:06d}")
    counts = Counter(state.counts)
    assert counts["trained"] == steps * groups_per_step
    assert not state.pending, "the last step needs all groups that were started"
    last = {line["step"]: line for line in run.metrics()}
    assert sorted(last) == list(range(1, steps + 1))
    assert all(line["staleness/max"] <= 1 for line in last.values())
    return dict(counts)
