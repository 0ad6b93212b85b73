"""A run in trouble gives up as little as it can, ends when it must, and can be saved where its learner lives."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from learner.spec import LearnerError
from orchestration import run_state
from orchestration.alternation import AlternatingLearner
from orchestration.failures import PoolExhausted, RunError
from orchestration.run_state import load_state
from rollout.full_store import StoreFull
from tests.orchestration.simulation import Simulation, Timing, once_each, simulated_config

# --- a learner that dies again and again ------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "every_steps"), [("save", 1), ("save", 3), ("train", 5)])
def test_a_learner_that_never_gets_past_a_point_ends_the_run(phase: str, every_steps: int, tmp_path: Path) -> None:
    """The steps that it repeats on its way there are no progress."""
    deaths = 0

    def die_there(simulation: Simulation) -> None:
        def die(now: str) -> bool:
            nonlocal deaths
            there = now == phase and (phase == "save" or len(simulation.learner.trained) >= 4 * 3)
            deaths += there
            return there

        simulation.learner.die = die

    simulation = Simulation(simulated_config(tmp_path, checkpoint__every_steps=every_steps), prepare=die_there)
    with pytest.raises(LearnerError, match=f"died in {phase}"):
        simulation.run()
    assert deaths == 4 and simulation.directory.latest_checkpoint() is None


def test_a_learner_that_dies_further_on_each_time_does_not_end_the_run(tmp_path: Path) -> None:
    due = [4, 8, 12, 16, 20, 24]

    def die_when_due(simulation: Simulation) -> None:
        def die(phase: str) -> bool:
            here = phase == "train" and bool(due) and len(simulation.learner.trained) >= due[0]
            return here and bool(due.pop(0))

        simulation.learner.die = die

    simulation = Simulation(simulated_config(tmp_path, checkpoint__every_steps=9), prepare=die_when_due, prompts=40)
    assert simulation.run().trained_prompts() == once_each(40) and not due


# --- weights that are gone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies", [False, True])
def test_weights_that_are_lost_are_published_again_by_the_learner_that_waits(dies: bool, tmp_path: Path) -> None:
    """Under the same number; a learner that has died meanwhile is rebuilt, and makes a new one."""
    published: list[int] = []

    def lose_three(simulation: Simulation) -> None:
        publish, learner = simulation.learner.publish, simulation.learner

        async def watched(version: int):
            assert not simulation.controller.slots.training or version not in published, "the learner waits"
            published.append(version)
            return await publish(version)

        learner.publish = watched
        learner.die = lambda phase: dies and published == [1, 2, 3, 3]
        simulation.rollout.loses_weights = lambda version: published == [1, 2, 3]

    config = simulated_config(tmp_path, steps=8, pipeline__max_staleness=0, checkpoint__every_steps=2)
    simulation = Simulation(config, prepare=lose_three, prompts=32).run()
    assert simulation.trained_prompts() == once_each(32)
    assert published[:4] == [1, 2, 3, 3]
    assert published[4:] == ([4, 5, 6, 7, 8, 9, 10] if dies else [4, 5, 6, 7, 8])
    counts = simulation.controller.slots.counts
    assert counts["trained"] == 32 and counts["dropped/learner lost"] == (counts["dispatched"] - 32 if dies else 0)
    assert sum(metrics.get("failures/republished", 0) for metrics in simulation.metrics) == (0 if dies else 1)


def test_a_version_that_nobody_can_get_ends_the_run_with_what_the_pool_offers(tmp_path: Path) -> None:
    """At bound 0 no group may start on actors that lag behind, and none is in flight."""

    def lag(simulation: Simulation) -> None:
        publish = simulation.rollout.publish

        async def lost_on_the_way(weights: Any) -> None:
            if weights.manifest.version < 3:
                await publish(weights)

        simulation.rollout.publish = lost_on_the_way

    config = simulated_config(tmp_path, steps=8, pipeline__max_staleness=0, pipeline__group_deadline_s=50.0)
    simulation = Simulation(config, prepare=lag)
    with pytest.raises(RunError, match=r"for 5\d s: the policy is at version 3, .* serve versions \[2\], 0 of 4 slots"):
        simulation.run()
    assert simulation.metrics[-1]["time/step_s"] < simulation.elapsed_s


def test_groups_that_take_longer_than_the_deadline_and_block_nobody_are_waited_for(tmp_path: Path) -> None:
    config = simulated_config(tmp_path, steps=3, pipeline__max_staleness=0, pipeline__group_deadline_s=1.0)
    simulation = Simulation(config, timing=Timing(sigma=0.1, mean_length=4000, cap=8000)).run()
    assert simulation.controller.step == 3 and simulation.controller.slots.counts["dispatched"] == 12


# --- a run that ends with a living learner ----------------------------------------------------------------------------


def test_batches_that_are_always_lost_end_the_run_which_can_be_saved(tmp_path: Path) -> None:
    simulation = Simulation(simulated_config(tmp_path, steps=20, checkpoint__every_steps=50))
    simulation.prepare = lambda s: setattr(s.learner, "gone", lambda group_id: s.controller.step >= 3)
    with pytest.raises(RunError, match="4 times in a row"):
        simulation.run()
    assert_saved(simulation, step=3)


@pytest.mark.parametrize("refused", [False, True])
def test_engines_that_are_lost_before_a_step_leave_a_run_that_can_be_saved(refused: bool, tmp_path: Path) -> None:
    """While they fall asleep, or wake from a step that was refused: the learner has not trained."""

    class Engines:
        async def sleep(self) -> None:
            if simulation.controller.step == 2 and not refused:
                raise PoolExhausted("rollout actor 0 was lost")

        async def wake(self) -> None:
            raise PoolExhausted("rollout actor 0 was lost")

    def alternate(simulation: Simulation) -> None:
        simulation.learner.gone = lambda group_id: refused and simulation.controller.step == 2
        learner: Any = AlternatingLearner(simulation.learner, Engines())
        simulation.learner.train, train = learner.train, simulation.learner.train
        learner._learner = type("Inner", (), {"train": staticmethod(train)})()

    simulation = Simulation(
        simulated_config(tmp_path, steps=5, pipeline__max_staleness=0, checkpoint__every_steps=50), prepare=alternate
    )
    with pytest.raises(PoolExhausted):
        simulation.run()
    assert_saved(simulation, step=2)


def assert_saved(simulation: Simulation, step: int) -> None:
    """As `train` does at the end: where no batch is in training, a checkpoint that fits the learner."""
    assert not simulation.controller.slots.training
    asyncio.run(simulation.controller.checkpoint())
    checkpoint = simulation.directory.latest_checkpoint()
    assert checkpoint is not None
    state = load_state(checkpoint)
    assert state.step == step and state.counts["trained"] == 4 * step == len(simulation.learner.trained)
    resumed = Simulation(simulation.config, resume=True).run()
    assert resumed.learner.trained == list(dict.fromkeys(resumed.learner.trained))


# --- room -------------------------------------------------------------------------------------------------------------


def test_two_moments_without_room_in_one_long_step_are_no_reason_to_end(tmp_path: Path) -> None:
    refused_at: list[float] = []

    def fill(simulation: Simulation) -> None:
        generate = simulation.rollout.generate

        async def generate_if_room(room, requests):
            answer = await generate(room, requests)
            if not refused_at or (len(refused_at) == 1 and simulation.loop.now - refused_at[0] > 600):
                refused_at.append(simulation.loop.now)
                raise StoreFull("full for a moment")
            return answer

        simulation.rollout.generate = generate_if_room

    config = simulated_config(tmp_path, steps=6, pipeline__sync_timeout_s=600, pipeline__max_staleness=1)
    timing = Timing(train_s=1500.0, mean_length=60000, cap=160000)
    simulation = Simulation(config, prepare=fill, timing=timing).run()
    assert simulation.controller.step == 6
    assert refused_at[1] - refused_at[0] > 600


# --- what was given up, and what time it took -------------------------------------------------------------------------


def test_lengths_of_what_is_dropped_are_counted_by_reason(tmp_path: Path) -> None:
    """When the learner dies: groups trained and not committed, and those that could not be trained in time any more."""
    given_up: list[int] = []

    def prepare(simulation: Simulation) -> None:
        ledger = simulation.controller._ledger
        roll_back, generate, score = ledger.roll_back, simulation.rollout.generate, simulation.verifier.score
        lengths: dict[str, int] = {}
        deaths: list[int] = []

        async def watched(room, requests):
            lengths.pop(requests[0].group_id, None)
            batch, summary = await generate(room, requests)
            lengths[summary.group_id] = sum(summary.lengths)
            return batch, summary

        async def slow(batch, gold, rule):
            await asyncio.sleep(30.0)
            return await score(batch, gold, rule)

        def watched_roll_back(version: int):
            uncommitted = [visit.group_id for visit in ledger._uncommitted]
            lost = roll_back(version)
            given_up.extend(lengths[name] for name in [*lost, *uncommitted] if name in lengths)
            assert len(uncommitted) == 12 and any(name in lengths for name in lost)
            return lost

        def die(phase: str) -> bool:
            if phase == "save" and simulation.controller.step == 6 and not deaths:
                deaths.append(1)
                return True
            return False

        simulation.rollout.generate, simulation.verifier.score = watched, slow
        ledger.roll_back, simulation.learner.die = watched_roll_back, die

    config = simulated_config(tmp_path, steps=8, checkpoint__every_steps=3, pipeline__max_staleness=2)
    simulation = Simulation(config, prepare=prepare).run()
    last = simulation.metrics[-1]
    assert last["dropped/learner_lost_tokens"] == sum(given_up) > 0
    assert last["dropped/learner_lost_responses"] == 2 * len(given_up)
    assert not simulation.controller._ledger._lengths.keys() - simulation.controller._ledger._visits.keys()


def test_step_times_add_up_to_the_time_of_the_run(tmp_path: Path) -> None:
    """With checkpoints, refused steps and a learner that is rebuilt."""
    troubles: list[str] = []

    def prepare(simulation: Simulation) -> None:
        def once(what: str, at_step: int) -> bool:
            if what in troubles or simulation.controller.step != at_step:
                return False
            troubles.append(what)
            return True

        simulation.learner.die = lambda phase: phase == "train" and once("death", 7)
        simulation.learner.gone = lambda group_id: once("gone", 3)

    config = simulated_config(tmp_path, steps=10, checkpoint__every_steps=3)
    simulation = Simulation(config, prepare=prepare, timing=Timing(save_s=30.0)).run()
    assert sorted(troubles) == ["death", "gone"]
    last_checkpoint_s = 30.0
    total = sum(metrics["time/step_s"] for metrics in simulation.metrics)
    assert total == pytest.approx(simulation.elapsed_s - last_checkpoint_s)
    assert all(0 <= metrics["idle/learner"] <= 1 for metrics in simulation.metrics)


# --- checkpoints beside the event loop --------------------------------------------------------------------------------


def on_a_real_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit_s: float = 0.5) -> Simulation:
    """A controller of a run that has not begun, whose checkpoints take their time to be committed."""
    simulation = Simulation(simulated_config(tmp_path))
    commit = run_state.commit

    def slow(*arguments: Any) -> None:
        time.sleep(commit_s)
        commit(*arguments)

    monkeypatch.setattr(run_state, "commit", slow)
    return simulation


async def longest_pause(until: asyncio.Future[Any]) -> float:
    longest = 0.0
    while not until.done():
        before = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - before)
    return longest


def test_the_event_loop_goes_on_while_a_checkpoint_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        simulation = on_a_real_clock(tmp_path, monkeypatch, commit_s=1.0)
        await simulation.start()
        writing = asyncio.ensure_future(simulation.controller.checkpoint())
        assert await longest_pause(writing) < 0.5
        await writing
        assert simulation.directory.latest_checkpoint() is not None

    asyncio.run(run())


def test_a_stop_in_the_middle_of_a_commit_leaves_the_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        simulation = on_a_real_clock(tmp_path, monkeypatch)
        await simulation.start()
        writing = asyncio.ensure_future(simulation.controller.checkpoint())
        for _ in range(2):  # two signals
            await asyncio.sleep(0.1)
            writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert [path.name for path in simulation.directory.checkpoints.iterdir()] == ["step_000000"]
        assert simulation.directory.latest_checkpoint() is not None

    asyncio.run(run())


def test_a_stop_while_the_learner_saves_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        simulation = on_a_real_clock(tmp_path, monkeypatch)
        simulation.timing.save_s = 10.0
        await simulation.start()
        writing = asyncio.ensure_future(simulation.controller.checkpoint())
        await asyncio.sleep(0.05)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert not list(simulation.directory.checkpoints.iterdir())

    asyncio.run(run())
