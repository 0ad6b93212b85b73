"""Faults that need a hand inside a process (matrix rows 4 and 9): broken engines, deaths between parts of weights.

Row 9 is part of CI.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from orchestration.tiny_model import TinyModelShape, build_tiny_model
from tests.chaos.faults import go_on, hit, setbacks, stop, wait_for_replacement
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = pytest.mark.slow
EVERY = 5
ENDLESS: dict[str, Any] = {"steps": 10**6, "checkpoint__stop_grace_s": 60}
TRANSFERS = ENDLESS | {"pipeline__shard_mb": 1, "pipeline__max_staleness": 0}
"""Every version must have arrived before the next group starts."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions, and a model whose heads serve two ranks and whose weights travel in two parts of a megabyte."""
    directory = make_inputs(tmp_path_factory.mktemp("inputs"))
    build_tiny_model(directory / "model", TinyModelShape(hidden_size=128, num_heads=4), seed=0)
    return directory


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


@pytest.mark.chaos
def test_an_engine_that_fails_while_its_actor_lives(inputs: Path, tmp_path: Path, orders: Path) -> None:
    run = Run(recipe(inputs, tmp_path / "run", rollout__num_actors=2, **ENDLESS))
    run.wait_for_step(3)
    dead = order(orders, run, "ray::RolloutActor", "fail in step")
    wait_for_replacement(run, "ray::RolloutActor", dead, count=2)
    in_service_again(run)
    stop(run, groups_per_step=4)
    assert "injected: the engine fails" in run.log.read_text(encoding="utf-8"), "the log names the cause"
    assert run.metrics()[-1]["failures/rollout_lost_error"] == 1


@pytest.mark.chaos
def test_a_dead_child_of_a_tensor_parallel_engine(inputs: Path, tmp_path: Path) -> None:
    """vLLM's worker process dies: the actor is replaced, and no process of the broken engine stays."""
    run = Run(recipe(inputs, tmp_path / "run", rollout__tensor_parallel_size=2, **ENDLESS))
    run.wait_for_step(3)
    (actor,) = run.actors("ray::RolloutActor")
    engine = [actor, *actor.children(recursive=True)]
    hit(run, "VLLM::Worker")
    wait_for_replacement(run, "ray::RolloutActor", actor.pid, count=1)
    _, alive = psutil.wait_procs(engine, timeout=30)
    assert len(engine) > 2 and not alive, f"orphans of the broken engine: {alive}"
    go_on(run, 3)
    stop(run, groups_per_step=4)


def test_deaths_between_two_parts_of_a_version(inputs: Path, tmp_path: Path, orders: Path) -> None:
    """Row 9: a rollout actor dies while it fetches a version, then the learner while it publishes one."""
    run = Run(recipe(inputs, tmp_path / "run", rollout__num_actors=2, checkpoint__every_steps=EVERY, **TRANSFERS))
    run.wait_for_step(3)
    dead = order(orders, run, "ray::RolloutActor", "die while fetching")
    wait_for_replacement(run, "ray::RolloutActor", dead, count=2)
    in_service_again(run)
    dead = order(orders, run, "ray::LearnerRank", "die while publishing")
    wait_for_replacement(run, "ray::LearnerRank", dead, count=1)
    go_on(run, EVERY)
    stop(run, groups_per_step=4, bound=0)
    assert "phase publish: rank 0 died" in run.log.read_text(encoding="utf-8")
    assert run.metrics()[-1]["failures/rollout_restarts"] == 1
    assert sum(setbacks(run)) <= EVERY
    no_torn_weights(run)


def in_service_again(run: Run) -> None:
    """The replacement has the current weights and takes part."""
    run.wait_until(lambda: run.metrics()[-1]["pool/rollout_actors"] == 2, "two rollout actors in service")
    go_on(run, 3)


def no_torn_weights(run: Run) -> None:
    """Every token was sampled under the very version that its step trained, with that version's weights.

    At bound 0 engine and learner compute the same densities; weights of two versions in one engine would not.
    """
    lines = {line["step"]: line for line in run.metrics()}  # a repeated step: what it was in the end
    for step, line in lines.items():
        table = pq.read_table(run.run_dir / "trajectories" / f"step_{step:06d}.parquet")
        versions = {piece["version"] for row in table.column("version_runs").to_pylist() for piece in row}
        assert versions == {line["sync/version"] - 1}, f"step {step} has tokens of {versions}"
        assert line["mismatch/max_thinking"] < 1e-3, f"step {step}: engine and learner disagree"
