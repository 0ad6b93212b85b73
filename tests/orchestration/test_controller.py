"""The controller's promises under faults and any timing, on a simulated clock."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from learner.spec import CheckpointNotWritten, LearnerError, NonFiniteGradients
from orchestration.controller import Controller
from orchestration.dataset import PromptStream
from orchestration.failures import RunError
from orchestration.run_state import load_state
from orchestration.slots import Phase
from rollout.full_store import StoreFull
from tests.orchestration.simulation import Simulation, Timing, once_each, prompt_rows, simulated_config

TURNS_OF_A_RUN = 3300
"""Of the event loop, in the test of kills; a run that others have begun takes fewer."""


def test_bound_zero_alternates_generation_and_training(tmp_path: Path) -> None:
    config = simulated_config(tmp_path, pipeline__max_staleness=0, steps=5)
    simulation = Simulation(config).run()
    assert simulation.ages == [0] * 20
    assert simulation.learner.trained == list(dict.fromkeys(simulation.learner.trained))
    assert simulation.controller.slots.counts["trained"] == 20
    assert simulation.controller.slots.counts["dispatched"] == 20, "nothing is started that no step could train"


def test_asynchrony_overlaps_generation_and_training(tmp_path: Path) -> None:
    runs = {}
    for bound in (0, 2):
        config = simulated_config(tmp_path / str(bound), pipeline__max_staleness=bound, steps=30)
        runs[bound] = Simulation(config, timing=Timing(train_s=4.0)).run()
    assert runs[2].elapsed_s < 0.75 * runs[0].elapsed_s
    assert max(runs[2].ages) <= 2


def test_lost_groups_come_back_and_nothing_is_trained_twice(tmp_path: Path) -> None:
    lost: Counter[str] = Counter()

    def lose_sometimes(simulation: Simulation) -> None:
        rng = random.Random(1)

        def lose(group_id: str) -> bool:
            lost[group_id] += 1
            return lost[group_id] == 1 and rng.random() < 0.3

        simulation.rollout.lose = lose

    config = simulated_config(tmp_path, steps=20)
    simulation = Simulation(config, prepare=lose_sometimes).run()
    trained = simulation.learner.trained
    assert max(lost.values()) == 2
    assert len(trained) == len(set(trained)) == 80
    assert simulation.controller.slots.counts["requeued"] > 0


@settings(max_examples=30, deadline=None)
@given(
    gone=st.lists(st.integers(0, 60), max_size=2, unique=True),  # with a death three setbacks in a row: no more may be
    dies=st.none() | st.integers(1, 30),
    bound=st.integers(0, 3),
)
@example(gone=[0, 1, 2, 3], dies=None, bound=0)  # a whole batch
@example(gone=[5], dies=2, bound=1)  # the learner dies in the step that was put back
def test_a_lost_batch_costs_its_group_only(gone: list[int], dies: int | None, bound: int, tmp_path_factory) -> None:
    """Whatever batches go with their nodes: generated again, trained once, within the bound; the learner stays."""
    calls: Counter[str] = Counter()
    lost: list[str] = []

    def prepare(simulation: Simulation) -> None:
        def is_gone(group_id: str) -> bool:
            calls["fetched"] += 1
            if calls["fetched"] - 1 in gone:
                lost.append(group_id)
                return True
            return False

        def die(phase: str) -> bool:
            calls["of the learner"] += 1
            return calls["of the learner"] == dies

        simulation.learner.gone, simulation.learner.die = is_gone, die

    config = simulated_config(tmp_path_factory.mktemp("gone"), steps=12, pipeline__max_staleness=bound)
    simulation = Simulation(config, prepare=prepare, prompts=48).run()
    counts = simulation.controller.slots.counts
    assert simulation.trained_prompts() == once_each(48) and counts["trained"] == 48
    assert counts["requeued"] == len(lost) == len([number for number in gone if number < calls["fetched"]])
    assert max(simulation.ages) <= bound
    if dies is None:
        assert not any(key.startswith("dropped") for key in counts), "only the lost groups were given up"


def test_learner_death_repeats_at_most_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    deaths = []

    def die_once(simulation: Simulation) -> None:
        def die(phase: str) -> bool:
            if phase == "train" and len(simulation.learner.trained) >= 28 and not deaths:
                deaths.append(simulation.controller.step)
                return True
            return False

        simulation.learner.die = die

    config = simulated_config(tmp_path, steps=12, checkpoint__every_steps=5)
    simulation = Simulation(config, prepare=die_once, prompts=48).run()
    assert deaths == [7]
    assert simulation.trained_prompts() == once_each(48), "the two steps since the checkpoint were repeated, not added"
    assert simulation.controller.slots.counts["dropped/learner lost"] >= 4 + 2 * 4
    assert max(simulation.ages) <= 2


@pytest.mark.parametrize("spoilt", [1, 2])
def test_a_batch_without_finite_gradients_is_failed_and_the_run_goes_on(tmp_path: Path, spoilt: int) -> None:
    """It is never issued again; the next batch trains the same step."""
    bad: list[str] = []

    def spoil(simulation: Simulation) -> None:
        train = simulation.learner.train

        async def sometimes(groups, step):
            if step == 3 and len(bad) < 4 * spoilt:
                bad.extend(group.group_id for group in groups)
                raise NonFiniteGradients("step 3: nan")
            return await train(groups, step)

        simulation.learner.train = sometimes

    simulation = Simulation(simulated_config(tmp_path, steps=8), prepare=spoil).run()
    counts = simulation.controller.slots.counts
    assert counts["failed/not finite"] == len(bad) == 4 * spoilt
    assert counts["trained"] == 32
    assert not set(bad) & set(simulation.learner.trained)
    assert max(simulation.ages) <= 2


@pytest.mark.parametrize("lasts", [1, 3])
def test_a_full_disk_costs_checkpoints_and_training_goes_on(tmp_path: Path, lasts: int) -> None:
    simulation = Simulation(
        simulated_config(tmp_path, steps=12, checkpoint__every_steps=2), prepare=full_disk(2, lasts)
    ).run()
    assert simulation.controller.step == 12
    assert sum(metrics.get("failures/unwritten_checkpoints", 0) for metrics in simulation.metrics) == lasts
    newest = simulation.directory.latest_checkpoint()
    assert newest is not None and load_state(newest).step == 12
    assert len(simulation.learner.trained) == len(set(simulation.learner.trained)) == 48


@pytest.mark.parametrize(("steps", "lasts", "last_step"), [(14, 9, 10), (6, 2, 6)])
def test_a_disk_that_stays_full_ends_the_run_with_the_checkpoint_before(
    tmp_path: Path, steps: int, lasts: int, last_step: int
) -> None:
    """After four in a row, or when the last one cannot be written."""
    simulation = Simulation(
        simulated_config(tmp_path, steps=steps, checkpoint__every_steps=2), prepare=full_disk(2, lasts)
    )
    with pytest.raises(RunError, match=rf"no checkpoint of step {last_step}, the last one is of step 2: .*No space"):
        simulation.run()
    newest = simulation.directory.latest_checkpoint()
    assert newest is not None and load_state(newest).step == 2


@pytest.mark.parametrize("refusals", [5, 10**6])
def test_a_full_object_store_slows_the_run_and_ends_it_at_the_deadline(tmp_path: Path, refusals: int) -> None:
    """Groups whose batch finds no room keep their slot for a while and are generated again."""
    refused: list[str] = []

    def fill(simulation: Simulation) -> None:
        generate = simulation.rollout.generate

        async def generate_if_room(room, requests):
            answer = await generate(room, requests)
            if simulation.controller.step >= 2 and len(refused) < refusals:
                refused.append(requests[0].group_id)
                raise StoreFull("group p: the object store of its node and /spill, which it spills to, are full")
            return answer

        simulation.rollout.generate = generate_if_room

    config = simulated_config(tmp_path, steps=6, pipeline__sync_timeout_s=100)
    simulation = Simulation(config, prepare=fill)
    if refusals > 5:
        with pytest.raises(RunError, match=r"no batch found room in 1\d\d s: group p: .*/spill"):
            simulation.run()
        assert len(refused) < 12 * 100, "refused groups wait before they are generated again"
        return
    simulation.run()
    assert simulation.controller.slots.counts["requeued"] == 5
    assert len(simulation.learner.trained) == len(set(simulation.learner.trained)) == 24


def test_a_failure_while_publishing_leaves_a_state_that_fits_the_learner(tmp_path: Path) -> None:
    """What the learner has trained, and what the driver would write beside it, are of the same step."""

    def fail_at_three(simulation: Simulation) -> None:
        publish = simulation.rollout.publish

        async def sometimes(weights):
            if weights.manifest.version == 3:
                raise RunError("the engines are gone")
            await publish(weights)

        simulation.rollout.publish = sometimes

    simulation = Simulation(simulated_config(tmp_path, steps=6), prepare=fail_at_three)
    with pytest.raises(RunError, match="engines are gone"):
        simulation.run()
    assert not simulation.controller.slots.training
    state = simulation.controller._ledger.state(simulation.controller.step)
    assert len(simulation.learner.trained) == 4 * state.step == state.counts["trained"]


def full_disk(after_step: int, lasts: int) -> Callable[[Simulation], None]:
    """The next `lasts` checkpoints after that step cannot be written."""

    def prepare(simulation: Simulation) -> None:
        save, refused = simulation.learner.save, []

        async def save_if_room(directory: Path) -> None:
            if simulation.controller.step > after_step and len(refused) < lasts:
                refused.append(directory)
                directory.mkdir(parents=True)
                raise CheckpointNotWritten("rank 0: No space left on device")
            await save(directory)

        simulation.learner.save = save_if_room

    return prepare


def test_a_learner_that_keeps_dying_ends_the_run(tmp_path: Path) -> None:
    config = simulated_config(tmp_path, steps=3)
    with pytest.raises(LearnerError, match="rank 0 died"):
        Simulation(config, prepare=lambda s: setattr(s.learner, "die", lambda phase: True)).run()


@pytest.mark.parametrize("hangs", ["generation", "grading"])
def test_a_group_that_never_finishes_is_dropped_for_age_and_issued_again(hangs: str, tmp_path: Path) -> None:
    """After the deadline, not before; a younger one that takes long, too, goes on."""
    seen: Counter[str] = Counter()
    drops: list[tuple[str, float, list[str]]] = []
    issued: list[tuple[str, float]] = []

    def hang_one(simulation: Simulation) -> None:
        decode, ledger = simulation.rollout._decode, simulation.controller._ledger
        drop, issue, score = ledger.drop, ledger.issue, simulation.verifier.score
        endless = 10**9 if hangs == "generation" else 3000

        async def slow(member, tokens):
            seen["responses"] += 1
            await decode(member, {41: endless, 57: 12000}.get(seen["responses"], tokens))

        async def grade(batch, gold, rule):
            seen["graded"] += 1
            await asyncio.sleep(10**7 if hangs == "grading" and seen["graded"] == 21 else 0)
            return await score(batch, gold, rule)

        def watched(group_id: str, reason: str) -> None:
            drops.append((group_id, simulation.loop.now, simulation.controller.slots.groups(Phase.GENERATING)))
            drop(group_id, reason)

        def watched_issue(actor_version: int):
            visit = issue(actor_version)
            issued.append((visit.group_id, simulation.loop.now))
            return visit

        simulation.rollout._decode, simulation.verifier.score = slow, grade
        ledger.drop, ledger.issue = watched, watched_issue

    config = simulated_config(tmp_path, steps=30, pipeline__max_staleness=4, pipeline__group_deadline_s=50.0)
    timing = Timing(sigma=0.3, mean_length=3000, cap=6000, train_s=4.0)  # others are generated for several steps, too
    simulation = Simulation(config, actors=1, prepare=hang_one, timing=timing, prompts=120).run()
    assert simulation.controller.slots.counts["dropped/age"] == len(drops) == 1
    ((group_id, dropped_at, generating),) = drops
    assert simulation.controller.slots.counts["dispatched"] == 121 and len(generating) == 2
    assert simulation.trained_prompts() == once_each(120), "the dropped prompt was issued again"
    responses = simulation.metrics[-1].get("dropped/age_responses", 0)
    assert responses == (2 if hangs == "grading" else 0), "the pool counts what was still being generated"
    assert simulation.rollout.given_up == ({} if hangs == "grading" else {group_id: ("age",)})
    waits = [metrics["time/learner_wait_s"] for metrics in simulation.metrics]
    assert 50 < max(waits) < 60
    assert (group_id, dropped_at) in issued, "its slot and its prompt are free at once"


def test_stop_request_leaves_a_checkpoint_with_everything(tmp_path: Path) -> None:
    def stop_later(simulation: Simulation) -> None:
        simulation.loop.call_later(55.0, simulation.controller.request_stop)

    config = simulated_config(tmp_path, steps=50, checkpoint__every_steps=50)
    first = Simulation(config, prepare=stop_later).run()
    assert 0 < first.controller.step < 50
    second = Simulation(config, resume=True).run()
    trained = second.learner.trained
    assert trained[: len(first.learner.trained)] == first.learner.trained, "no step is repeated after a graceful stop"
    assert len(trained) == len(set(trained)) == 200


@pytest.mark.parametrize("keep_last", [1, 3])
def test_the_newest_checkpoints_are_kept(keep_last: int, tmp_path: Path) -> None:
    config = simulated_config(tmp_path, steps=4, checkpoint__every_steps=1, checkpoint__keep_last=keep_last)
    Simulation(config).run()
    kept = sorted(path.name for path in (config.run_dir / "checkpoints").glob("step_*"))
    assert kept == [f"step_{step:06d}" for step in range(5 - keep_last, 5)]


def test_a_broken_verifier_pauses_training_until_it_works_again(tmp_path: Path) -> None:
    broken_between = (30.0, 50.0)
    ungraded: set[str] = set()
    trained_ungraded: list[str] = []

    def break_for_a_while(simulation: Simulation) -> None:
        def breaks(group_id: str) -> bool:
            broken = broken_between[0] < simulation.loop.now < broken_between[1]
            (ungraded.add if broken else ungraded.discard)(group_id)
            return broken

        train = simulation.learner.train

        async def watched(groups, step):
            trained_ungraded.extend(group.group_id for group in groups if group.group_id in ungraded)
            return await train(groups, step)

        simulation.verifier.breaks, simulation.learner.train = breaks, watched

    config = simulated_config(tmp_path, steps=20, reward__failure_alarm=0.2)
    simulation = Simulation(config, prepare=break_for_a_while).run()
    counts = simulation.controller.slots.counts
    assert counts["trained"] == len(set(simulation.learner.trained)) == 80
    assert counts["dropped/ungraded"] >= 4
    assert len(trained_ungraded) < 4, "only groups of batches below the alarm"
    assert max(simulation.ages) <= 2


def test_a_verifier_that_stays_broken_ends_the_run(tmp_path: Path) -> None:
    def break_later(simulation: Simulation) -> None:
        simulation.verifier.breaks = lambda group_id: simulation.controller.step >= 3

    simulation = Simulation(simulated_config(tmp_path, steps=20), prepare=break_later)
    with pytest.raises(RunError, match=r"of 8 answers could not be graded, .*alarm=0.2: \d crash \(the last: segmen"):
        simulation.run()
    assert 3 <= simulation.controller.step < 8


@pytest.mark.parametrize("on_failure", ["incorrect", "mask"])
def test_an_answer_whose_grader_failed_counts_as_wrong_or_is_masked(tmp_path: Path, on_failure: str) -> None:
    """An alarm of 1 trains whatever comes."""
    found: list[tuple[tuple[float, ...], tuple[bool, ...]]] = []

    def break_one_prompt(simulation: Simulation) -> None:
        simulation.verifier.breaks = lambda group_id: group_id.startswith("p7@")
        train = simulation.learner.train

        async def watched(groups, step):
            found.extend((group.rewards, group.keep) for group in groups if group.group_id.startswith("p7@"))
            return await train(groups, step)

        simulation.learner.train = watched

    config = simulated_config(tmp_path, steps=3, reward__failure_alarm=1.0, reward__on_failure=on_failure)
    simulation = Simulation(config, prepare=break_one_prompt, prompts=12).run()
    assert simulation.controller.slots.counts["trained"] == 12
    assert found == [((0.0, 0.0), (on_failure == "incorrect",) * 2)]


@settings(max_examples=40, deadline=None)
@given(deaths=st.lists(st.integers(0, 45), max_size=3, unique=True), bound=st.integers(0, 3), every=st.integers(1, 5))
@example(deaths=[27], bound=0, every=5)  # in the last checkpoint
@example(deaths=[8, 9, 10], bound=2, every=3)  # in a publication, and while the next generation starts
def test_learner_deaths_in_any_phase(deaths: list[int], bound: int, every: int, tmp_path_factory) -> None:
    calls = Counter()

    def prepare(simulation: Simulation) -> None:
        def die(phase: str) -> bool:
            calls["of the learner"] += 1
            return calls["of the learner"] in deaths

        simulation.learner.die = die

    config = simulated_config(
        tmp_path_factory.mktemp("deaths"), steps=12, pipeline__max_staleness=bound, checkpoint__every_steps=every
    )
    simulation = Simulation(config, prepare=prepare, prompts=48, timing=Timing(publish_s=2.0, save_s=2.0)).run()
    assert simulation.trained_prompts() == once_each(48), "every prompt of the pass, none twice"
    assert max(simulation.ages) <= bound
    assert simulation.controller.slots.counts["trained"] == 48


@pytest.mark.parametrize("bound", [0, 1])
def test_a_slot_is_free_once_its_group_was_trained_and_its_version_published(bound: int, tmp_path: Path) -> None:
    """While a publication lasts its batch is outstanding: nothing may start in its place."""
    published: list[int] = []

    def watch(simulation: Simulation) -> None:
        publish = simulation.learner.publish

        async def watched(version: int):
            slots = simulation.controller.slots
            weights = await publish(version)
            assert slots.training and slots.version == version - 1
            assert slots.counts["dispatched"] <= slots.counts["trained"] + slots.capacity
            published.append(version)
            return weights

        simulation.learner.publish = watched

    config = simulated_config(tmp_path, steps=4, pipeline__max_staleness=bound)
    Simulation(config, prepare=watch, timing=Timing(publish_s=30.0)).run()
    assert published == [1, 2, 3, 4]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    every=st.integers(1, 6),
    bound=st.integers(0, 3),
    kills=st.lists(st.integers(2, TURNS_OF_A_RUN), min_size=1, max_size=3),
)
def test_kill_at_any_moment_then_resume_commits_every_prompt_once(
    every: int, bound: int, kills: list[int], tmp_path_factory
) -> None:
    """30 random points: over a complete pass every prompt id is committed once, or failed with a reason."""
    config = simulated_config(
        tmp_path_factory.mktemp("kill"), steps=15, checkpoint__every_steps=every, pipeline__max_staleness=bound
    )
    bad = [next(visits).group_id for visits in [PromptStream(prompt_rows(61), seed=0)] for _ in range(10)][-1]
    attempts: list[Simulation] = []
    controllers: list[Controller] = []

    def prepare(simulation: Simulation) -> None:
        simulation.rollout.refuse = lambda group_id: group_id == bad
        reached = controllers[-1].step if controllers else 0
        assert reached - every <= simulation.controller.step <= reached, "at most so many steps are repeated"
        controllers.append(simulation.controller)

    for killed_at in [*kills, None]:
        attempt = Simulation(
            config,
            prompts=61,
            prepare=prepare,
            seed=len(attempts),
            timing=Timing(publish_s=1.0, save_s=1.0),
            resume=bool(attempts),
            killed_at=killed_at,
        ).run()
        attempts.append(attempt)
        assert attempt.killed or killed_at is None or attempt.loop.turns < killed_at
    assert attempt.trained_prompts() == once_each(61) - Counter([bad.partition("@")[0]])
    counts = attempt.controller.slots.counts
    assert counts["trained"] == 60 and counts["failed/generation or grading"] == 1
    assert max(attempt.ages, default=0) <= bound
    for attempt in attempts:
        if attempt.killed:
            attempt.bury()
