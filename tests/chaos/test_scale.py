"""The rollout pool grows and shrinks under a running run."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration import scale
from orchestration.tiny_model import TinyModelShape, build_tiny_model
from tests.chaos.faults import balanced
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]


def test_grow_and_shrink(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    steps = 400
    run = Run(recipe(inputs, tmp_path / "run", steps=steps, checkpoint__every_steps=100))
    run.wait_for_step(3)
    assert scale.main(["--run", str(run.run_dir), "--rollout", "2"]) == 0
    run.wait_until(lambda: run.metrics()[-1]["pool/rollout_actors"] == 2, "a second rollout actor in service")
    assert scale.main(["--run", str(run.run_dir), "--rollout", "1"]) == 0
    run.wait_until(lambda: run.metrics()[-1]["pool/rollout_actors"] == 1, "one rollout actor again")
    assert run.wait() == 0, run.tail()
    counts = balanced(run, steps, groups_per_step=4)
    assert counts.get("requeued", 0) == 0, "a member that leaves finishes its work"


def test_running_groups_move_when_the_pool_shrinks(tmp_path: Path) -> None:
    """Responses that take longer than the pool looks away: those on the actor that leaves go on on the other."""
    inputs = make_inputs(tmp_path / "inputs")
    build_tiny_model(inputs / "model", TinyModelShape(max_positions=512), seed=0)
    steps = 30
    changes = {"sampling__max_new_tokens": 400, "sampling__max_thinking_tokens": 380, "rollout__num_actors": 2}
    run = Run(recipe(inputs, tmp_path / "run", steps=steps, checkpoint__every_steps=10, **changes))
    run.wait_for_step(3)
    assert scale.main(["--run", str(run.run_dir), "--rollout", "1"]) == 0
    run.wait_until(lambda: run.metrics()[-1]["pool/rollout_actors"] == 1, "one rollout actor")
    assert run.wait(600) == 0, run.tail()
    assert run.metrics()[-1]["failures/rollout_cut"] >= 1, "somebody's group was cut and went on"
    counts = balanced(run, steps, groups_per_step=4)
    assert counts.get("requeued", 0) == 0, "no work was lost"
    assert all(line["rollout/length_max"] <= 400 for line in run.metrics())
