"""What hangs or crawls instead of dying (fault matrix rows 3, 8 and 24): SIGSTOP looks like a hang to everybody."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.faults import balanced, go_on, hit, stop, wait_for_replacement
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
ENDLESS: dict[str, Any] = {"steps": 10**6, "checkpoint__stop_grace_s": 60}
"""A run that ends when its test has seen enough, on fast machines and slow ones."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_hung_rollout_actor_is_replaced(inputs: Path, tmp_path: Path) -> None:
    """The deadline of its requests notices; the groups are generated elsewhere."""
    run = Run(recipe(inputs, tmp_path / "run", rollout__num_actors=2, rollout__request_timeout_s=15, steps=40, seed=3))
    run.wait_for_step(3)
    dead = hit(run, "ray::RolloutActor", signal.SIGSTOP)
    wait_for_replacement(run, "ray::RolloutActor", dead, count=2)
    assert run.wait() == 0, run.tail()
    balanced(run, 40, groups_per_step=4)


def test_a_dead_and_then_a_hung_verifier_actor_are_replaced(inputs: Path, tmp_path: Path) -> None:
    """An unanswered ping notices the hang, or the deadline of a grading; the groups are graded elsewhere."""
    run = Run(recipe(inputs, tmp_path / "run", reward__num_actors=2, reward__deadline_s=1, **ENDLESS))
    run.wait_for_step(3)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        dead = hit(run, "ray::VerifierActor", number)
        wait_for_replacement(run, "ray::VerifierActor", dead, count=2)
        run.wait_until(lambda: run.metrics()[-1]["pool/verifier_actors"] == 2, "two verifiers in service")
    go_on(run, 3)
    counts = stop(run, groups_per_step=4)
    assert set(counts) <= {"dispatched", "trained", "requeued"}, "no group may pay for its verifier"
    assert run.metrics()[-1]["failures/verifier_restarts"] == 2


def test_a_hung_rank_and_then_a_dead_one_take_the_learner_with_them(inputs: Path, tmp_path: Path) -> None:
    """Row 8, and row 7 with two ranks: the peer waits in a collective; both times all ranks start from a checkpoint."""
    every = 10
    changes = {"learner__world_size": 2, "learner__step_timeout_s": 20, "pipeline__sync_timeout_s": 20}
    run = Run(recipe(inputs, tmp_path / "run", checkpoint__every_steps=every, **changes, **ENDLESS))
    run.wait_for_step(every + 2)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        ranks = {process.pid for process in run.actors("ray::LearnerRank")}
        hit(run, "ray::LearnerRank", number, which=1)
        run.wait_until(
            lambda gone=ranks: len({p.pid for p in run.actors("ray::LearnerRank")} - gone) == 2, "two new learner ranks"
        )
        run.wait_until(lambda gone=ranks: not any(psutil.pid_exists(pid) for pid in gone), "the old ranks to be gone")
        go_on(run, every)
    counts = stop(run, groups_per_step=4)
    log = run.log.read_text(encoding="utf-8")
    assert re.search(r"not done after 2\d s", log), "a deadline, of the step or of its fetch, noticed the hang"
    repeated = len(run.metrics()) - run.metrics()[-1]["step"]
    assert repeated <= 2 * every and counts["dropped/learner lost"] > 0


def test_a_straggler_slows_the_run_and_loses_nothing(inputs: Path, tmp_path: Path) -> None:
    """Row 24: one of two rollout actors at a tenth of its speed; the bound holds and nobody calls it dead."""
    run = Run(recipe(inputs, tmp_path / "run", rollout__num_actors=2, **ENDLESS))
    run.wait_for_step(3)
    with slowed(run.actors("ray::RolloutActor")[0], share=0.1):
        go_on(run, 30)
    counts = stop(run, groups_per_step=4)
    assert set(counts) <= {"dispatched", "trained"}, "a group of the straggler was given up or lost"


@contextmanager
def slowed(process: psutil.Process, share: float, period_s: float = 0.5) -> Iterator[None]:
    """The process runs for that share of every period."""
    ended = threading.Event()

    def alternate() -> None:
        with suppress(psutil.NoSuchProcess):
            while not ended.is_set():
                process.suspend()
                time.sleep((1 - share) * period_s)
                process.resume()
                time.sleep(share * period_s)

    thread = threading.Thread(target=alternate, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)
