"""Faults that need a hand inside a process (matrix rows 4 and 9): broken engines, deaths between parts of weights."""

from __future__ import annotations

from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from orchestration.tiny_model import TinyModelShape, build_tiny_model
from tests.chaos.faults import balanced, hit, wait_for_replacement
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
STEPS = 300
EVERY = 10


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the workers of a run look for orders."""
    folder = tmp_path / "orders"
    folder.mkdir()
    monkeypatch.setenv("SOFTGRPO_TEST_ORDERS", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "injected"))
    return folder


def order(orders: Path, run: Run, title: str, fault: str) -> int:
    """One worker of that title gets the order; returns its pid."""
    pid = int(run.actors(title)[0].pid)
    aside = orders / f"{pid}.tmp"
    aside.write_text(fault, encoding="utf-8")
    aside.rename(orders / str(pid))
    return pid


def test_an_engine_that_fails_while_its_actor_lives(inputs: Path, tmp_path: Path, orders: Path) -> None:
    run = Run(recipe(inputs, tmp_path / "run", rollout__num_actors=2, steps=STEPS))
    run.wait_for_step(3)
    dead = order(orders, run, "ray::RolloutActor", "fail in step")
    wait_for_replacement(run, "ray::RolloutActor", dead, count=2)
    assert run.wait() == 0, run.tail()
    assert "injected: the engine fails" in run.log.read_text(encoding="utf-8"), "the log names the cause"
    balanced(run, STEPS, groups_per_step=4)
    assert run.metrics()[-1]["failures/rollout_lost_error"] == 1


def test_a_dead_child_of_a_tensor_parallel_engine(inputs: Path, tmp_path: Path) -> None:
    """vLLM's worker process dies: the actor is replaced, and no process of the broken engine stays."""
    build_tiny_model(tmp_path / "model", TinyModelShape(hidden_size=128, num_heads=4), seed=0)  # heads for two ranks
    model, steps = {"dtype": "float32", "path": str(tmp_path / "model")}, 40
    run = Run(recipe(inputs, tmp_path / "run", rollout__tensor_parallel_size=2, model=model, steps=steps))
    run.wait_for_step(3)
    (actor,) = run.actors("ray::RolloutActor")
    engine = [actor, *actor.children(recursive=True)]
    hit(run, "VLLM::Worker")
    wait_for_replacement(run, "ray::RolloutActor", actor.pid, count=1)
    _, alive = psutil.wait_procs(engine, timeout=30)
    assert len(engine) > 2 and not alive, f"orphans of the broken engine: {alive}"
    assert run.wait() == 0, run.tail()
    balanced(run, steps, groups_per_step=4)


def test_a_rollout_actor_that_dies_between_two_parts_of_a_version(inputs: Path, tmp_path: Path, orders: Path) -> None:
    run = Run(recipe(inputs, tmp_path / "run", rollout__num_actors=2, steps=STEPS, pipeline__shard_mb=1))
    run.wait_for_step(3)
    dead = order(orders, run, "ray::RolloutActor", "die while fetching")
    wait_for_replacement(run, "ray::RolloutActor", dead, count=2)
    assert run.wait() == 0, run.tail()
    balanced(run, STEPS, groups_per_step=4)
    assert run.metrics()[-1]["failures/rollout_restarts"] == 1
    no_torn_weights(run)


def test_a_learner_that_dies_between_two_parts_of_a_version(inputs: Path, tmp_path: Path, orders: Path) -> None:
    config = recipe(inputs, tmp_path / "run", steps=STEPS, checkpoint__every_steps=EVERY, pipeline__shard_mb=1)
    run = Run(config)
    run.wait_for_step(3)
    dead = order(orders, run, "ray::LearnerRank", "die while publishing")
    wait_for_replacement(run, "ray::LearnerRank", dead, count=1)
    assert run.wait() == 0, run.tail()
    assert "phase publish: rank 0 died" in run.log.read_text(encoding="utf-8")
    balanced(run, STEPS, groups_per_step=4)
    assert len(run.metrics()) - STEPS <= EVERY
    no_torn_weights(run)


def no_torn_weights(run: Run) -> None:
    """Every sample names the versions of its tokens, and the learner finds the densities that the engine recorded.

    At the same version both compute the same numbers; weights of two versions in one engine would not.
    """
    lines = {line["step"]: line for line in run.metrics()}.values()  # a repeated step: what it was in the end
    for line in lines:
        oldest, newest = line["sync/version"] - 2, line["sync/version"] - 1
        if line["staleness/max"] == 0:
            assert line["mismatch/max_thinking"] < 1e-3, f"step {line['step']}: engine and learner disagree"
        table = pq.read_table(run.run_dir / "trajectories" / f"step_{line['step']:06d}.parquet")
        versions = {piece["version"] for row in table.column("version_runs").to_pylist() for piece in row}
        assert min(versions) >= 0 and max(versions) <= newest, f"step {line['step']} has tokens of {versions}"
        assert min(versions) >= oldest, f"step {line['step']} has tokens of {versions}"
    assert any(line["staleness/max"] == 0 for line in lines)
