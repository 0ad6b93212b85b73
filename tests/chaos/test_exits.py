"""How runs end that cannot go on (fault matrix rows 2 and 11): the exit code, a message, and what is left."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from orchestration.checkpoints import damage
from tests.chaos.faults import balanced
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_rollout_actors_that_die_at_every_start_end_the_run(inputs: Path, tmp_path: Path) -> None:
    """Row 2: the restart budget ends it: code 1, a checkpoint of the last step, a message that says what to do."""
    run = Run(recipe(inputs, tmp_path / "run", rollout__num_actors=2, pipeline__max_restarts=3, steps=10**6))
    run.wait_for_step(3)
    deadline = time.monotonic() + 240
    while run.process.poll() is None and time.monotonic() < deadline:
        for actor in run.actors("ray::RolloutActor"):
            actor.kill()
        time.sleep(0.2)
    assert run.wait(60) == 1, run.tail()
    log = run.log.read_text(encoding="utf-8")
    assert "the restart budget is spent; raise pipeline.max_restarts" in log
    assert "Traceback" not in log.split("the restart budget is spent")[-1], "an expected end needs no stack"
    last = run.metrics()[-1]["step"]
    checkpoint = run.run_dir / "checkpoints" / f"step_{last:06d}"
    assert damage(checkpoint) is None
    assert f"continue with --resume from {checkpoint.name}" in log


def test_a_second_driver_is_refused_and_the_first_goes_on(inputs: Path, tmp_path: Path) -> None:
    """Row 11: nothing of the second driver touches the run."""
    steps = 60
    config = recipe(inputs, tmp_path / "run", steps=steps)
    first = Run(config)
    first.wait_for_step(3)
    second = Run(config, "--resume")
    assert second.wait(60) == 1
    message = second.tail()
    assert f"another driver (pid {first.process.pid} on" in message
    assert "Traceback" not in message
    assert psutil.pid_exists(first.process.pid)
    assert first.wait() == 0, first.tail()
    balanced(first, steps, groups_per_step=4)
    assert {line["attempt"] for line in first.metrics()} == {1}
