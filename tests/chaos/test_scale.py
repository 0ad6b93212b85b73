"""The rollout pool grows and shrinks under a running run."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration import scale
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
