"""Faults for real runs: who to hit, with what, and what must hold afterwards."""

from __future__ import annotations

import signal
from pathlib import Path

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


def ledger(run: Run, steps: int, groups_per_step: int, bound: int = 1) -> dict[str, int]:
    """The counts of the checkpoint at `steps`, the last: full batches, nothing too old, versions unique."""
    counts = load_state(_checkpoint(run, steps)).counts
    assert counts["trained"] == steps * groups_per_step
    lines = run.metrics()
    assert sorted({line["step"] for line in lines}) == list(range(1, steps + 1))
    assert max(line["staleness/max"] for line in lines) <= bound
    for attempt in {line["attempt"] for line in lines}:
        versions = [line["sync/version"] for line in lines if line["attempt"] == attempt]
        assert versions == sorted(set(versions)), "a version number was used for two policies"
    return counts


def go_on(run: Run, steps: int) -> None:
    """Until so many more steps were committed."""
    reached = run.metrics()[-1]["step"]
    run.wait_until(lambda: run.metrics()[-1]["step"] >= reached + steps, f"{steps} steps beyond {reached}")


def stop(run: Run, groups_per_step: int, bound: int = 1) -> dict[str, int]:
    """End a run of no fixed length by a signal; the ledger of the checkpoint that it leaves.

    The recipe should give it `checkpoint.stop_grace_s` for a busy machine.
    """
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(180) == 75, run.tail()
    return ledger(run, run.metrics()[-1]["step"], groups_per_step, bound)


def balanced(run: Run, steps: int, groups_per_step: int) -> dict[str, int]:
    """The ledger of a finished run: every step trained a full batch, every group ended once; returns the counts."""
    assert not load_state(_checkpoint(run, steps)).pending, "the last step needs all groups that were started"
    return ledger(run, steps, groups_per_step)


def _checkpoint(run: Run, step: int) -> Path:
    return run.run_dir / "checkpoints" / f"step_{step:06d}"
