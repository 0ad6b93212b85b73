"""Real kills on the real stack (fault matrix rows 1, 7, 9 and 10): nothing is lost but seconds."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.chaos.faults import balanced, hit, wait_for_replacement
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_rollout_and_learner_killed_in_one_run(inputs: Path, tmp_path: Path) -> None:
    """A rollout actor dies in mid-generation, its replacement serves the newest weights; then the learner dies."""
    steps = 600  # an idle machine makes 200 while an actor starts
    run = Run(recipe(inputs, tmp_path / "run", rollout__num_actors=2, steps=steps, checkpoint__every_steps=10))
    run.wait_for_step(4)
    dead = hit(run, "ray::RolloutActor")
    wait_for_replacement(run, "ray::RolloutActor", dead, count=2)
    reached = len(run.metrics())
    dead = hit(run, "ray::LearnerRank")
    wait_for_replacement(run, "ray::LearnerRank", dead, count=1)
    assert run.wait() == 0, run.tail()

    counts = balanced(run, steps, groups_per_step=4)
    lines = run.metrics()
    assert lines[-1]["failures/rollout_restarts"] == 1
    # Whether it had work when it died is chance; `test_controller.py` covers the requeue.
    assert counts["dropped/learner lost"] <= (10 + 1) * 4, "more than the steps since the checkpoint were repeated"
    repeated = len(lines) - steps
    assert 0 <= repeated <= 10
    assert reached < steps, "the learner was killed after the run had ended"
    versions = [line["sync/version"] for line in lines]
    assert versions == sorted(set(versions)), "a version number was used for two policies"


def test_driver_killed_and_resumed(inputs: Path, tmp_path: Path) -> None:
    """kill -9 of the driver, twice, at moments of no importance; the resumed run commits every step once."""
    steps = 60
    config = recipe(inputs, tmp_path / "run", steps=steps, checkpoint__every_steps=5)
    run = Run(config)
    run.wait_for_step(12)
    workers = [p for title in ("RolloutActor", "VerifierActor", "LearnerRank") for p in run.actors(f"ray::{title}")]
    workers += [child for worker in workers for child in worker.children(recursive=True)]
    run.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert len(workers) > 3 and not alive, f"outlive the driver: {alive}"
    seen = [line["step"] for line in run.metrics()]

    resumed = Run(config, "--resume")
    assert resumed.wait() == 0, resumed.tail()
    lines = resumed.metrics()
    first = [line["step"] for line in lines][len(seen)]
    assert first > seen[-1] - 5, "more than checkpoint_every steps were repeated"
    balanced(resumed, steps, groups_per_step=4)
    assert {line["attempt"] for line in lines} == {1, 2}
