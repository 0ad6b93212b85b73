"""Faults for real runs: who to hit, with what, and what must hold afterwards."""

from __future__ import annotations

import itertools
import signal
from collections import Counter
from pathlib import Path

import psutil

from orchestration.config import load_config
from orchestration.dataset import PromptStream, load_rows
from orchestration.groups_log import read_groups
from orchestration.run_state import load_state
from tests.end_to_end.recipes import Run

ACTORS = ("LearnerRank", "RolloutActor", "VerifierActor")


def hit(run: Run, title: str, number: signal.Signals = signal.SIGKILL, which: int = 0) -> int:
    """Send a signal to one worker process of the run; returns its pid."""
    process = run.actors(title)[which]
    process.send_signal(number)
    return int(process.pid)


def kill_driver(run: Run) -> None:
    """SIGKILL to the driver; nothing of the run outlives it."""
    actors = [actor for name in ACTORS for actor in run.actors(f"ray::{name}")]
    workers = [process for actor in actors for process in _with_children(actor)]
    run.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, f"outlive the driver: {alive}"


def wait_for_replacement(run: Run, title: str, dead: int, count: int) -> None:
    """Until `count` processes of this class run and none of them is the dead one."""

    def replaced() -> bool:
        pids = [process.pid for process in run.actors(title)]
        return len(pids) >= count and dead not in pids

    run.wait_until(replaced, f"a replacement of {title}")


def ledger(run: Run, steps: int, groups_per_step: int, bound: int = 1) -> dict[str, int]:
    """The counts of the checkpoint at `steps`, the last: full batches, once each, nothing too old, versions unique."""
    committed_once(run, steps)
    counts = load_state(_checkpoint(run, steps)).counts
    assert counts["trained"] == steps * groups_per_step
    lines = run.metrics()
    assert sorted({line["step"] for line in lines}) == list(range(1, steps + 1))
    assert max(line["staleness/max"] for line in lines) <= bound
    for attempt in {line["attempt"] for line in lines}:
        versions = [line["sync/version"] for line in lines if line["attempt"] == attempt]
        assert versions == sorted(set(versions)), "a version number was used for two policies"
    return counts


def committed_once(run: Run, steps: int) -> int:
    """Every visit issued until the checkpoint at `steps`, the last, is in exactly one of its steps, pending, or failed.

    By id, from `groups.jsonl`. Returns the number of passes over the prompts of which every one was trained.
    """
    config = load_config(run.run_dir / "config.yaml")
    rows = load_rows(config.data.train, config.reward)
    state, record = load_state(_checkpoint(run, steps)), read_groups(run.run_dir)
    stream = PromptStream(rows, seed=config.seed)
    assert state.stream["digest"] == stream.state()["digest"], "the run had other prompts"
    num_issued = state.stream["epoch"] * len(rows) + state.stream["position"]
    issued = {visit.group_id for visit in itertools.islice(stream, num_issued)}
    times = Counter(group for step in range(1, steps + 1) for group in record[step]["trained"])
    times.update(f"{prompt}@{visit}" for prompt, visit in state.pending)
    twice, unknown, lost = {group for group in times if times[group] > 1}, times.keys() - issued, issued - times.keys()
    assert not twice, f"trained or pending more than once: {twice}"
    assert not unknown, f"trained without being issued: {unknown}"
    failed = sum(count for reason, count in state.counts.items() if reason.startswith("failed/"))
    assert len(lost) == failed, f"neither trained nor pending: {lost}; {failed} have failed"
    waiting = {visit for _, visit in state.pending} | {int(group.rpartition("@")[2]) for group in lost}
    return sum(visit not in waiting for visit in range(num_issued // len(rows)))


def setbacks(run: Run) -> list[int]:
    """How many steps were repeated, each time that some were."""
    steps = [line["step"] for line in run.metrics()]
    return [before - after + 1 for before, after in itertools.pairwise(steps) if after <= before]


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


def _with_children(process: psutil.Process) -> list[psutil.Process]:
    """Nobody, where it is gone already."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _checkpoint(run: Run, step: int) -> Path:
    return run.run_dir / "checkpoints" / f"step_{step:06d}"
