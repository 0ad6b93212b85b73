"""A real run through every part, a graceful stop and a resume."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from orchestration.checkpoints import damage
from orchestration.run_state import load_state
from tests.chaos.faults import committed_once
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_sigterm_then_resume_on_fewer_actors_and_ranks(inputs: Path, tmp_path: Path) -> None:
    """Two rollout actors, two learner ranks, deltas and MLflow; stopped after some steps, finished by one of each."""
    run_dir = tmp_path / "outputs" / "pair"
    changes = {"rollout__num_actors": 2, "learner__world_size": 2, "pipeline__transport": "delta"}
    config = recipe(inputs, run_dir, tracking__mlflow=True, steps=400, **changes)
    run = Run(config)
    run.wait_for_step(3)
    assert len(run.actors("ray::RolloutActor")) == len(run.actors("ray::LearnerRank")) == 2
    descendants = run.descendants()
    run.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert run.wait(deadline_s=30) == 75, run.tail()
    assert time.monotonic() - started < 15
    assert not _alive(descendants)

    done = len(run.metrics())
    run = Run(config, f"steps={done + 2}", "--resume", "rollout.num_actors=1", "learner.world_size=1")
    run.wait_for_step(done + 1)
    descendants = run.descendants()
    assert run.wait() == 0, run.tail()
    assert not _alive(descendants)

    lines = run.metrics()
    steps = list(range(1, done + 3))
    assert [line["step"] for line in lines] == steps, "no step is repeated or skipped after a graceful stop"
    assert [line["sync/version"] for line in lines] == steps
    assert all(line["staleness/max"] <= 1 for line in lines)
    assert all(line["rollout/soft_share"] > 0.2 for line in lines), "a silent fall-back to discrete rollouts"
    trained = [json.loads(line) for line in (run_dir / "groups.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in trained] == steps, "a step has trained twice"
    assert {line["attempt"] for line in trained} == {1, 2}
    committed_once(run, steps[-1])
    checkpoint = run_dir / "checkpoints" / f"step_{steps[-1]:06d}"
    assert damage(checkpoint) is None
    assert load_state(checkpoint).counts["trained"] == lines[-1]["groups/trained"] == 4 * steps[-1]

    sample = pq.read_table(run_dir / "trajectories" / "step_000001.parquet")
    assert sample.num_rows == 4
    assert {"noise", "weights", "version_runs", "verdict"} <= set(sample.column_names)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["learner"]["world_size"] == 1
    with sqlite3.connect(run_dir.parent / "mlflow.db") as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
        logged = store.execute("select step from metrics where key = 'reward/mean' order by step").fetchall()
    assert [step for (step,) in logged] == steps


def _alive(processes: list) -> list:
    import psutil

    return psutil.wait_procs(processes, timeout=30)[1]
