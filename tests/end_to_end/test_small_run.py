"""A real run through every part: two rollout actors, a two-rank learner, verifier, MLflow; and its ends."""

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


def test_two_rollout_actors_and_two_learner_ranks(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "outputs" / "pair"
    changes = {
        "rollout__num_actors": 2,
        "learner__world_size": 2,
        "pipeline__transport": "delta",
        "tracking__mlflow": True,
        "steps": 4,
    }
    run = Run(recipe(inputs, run_dir, **changes))
    run.wait_until(lambda: len(run.actors("ray::RolloutActor")) == 2, "two rollout actors")
    run.wait_until(lambda: len(run.actors("ray::LearnerRank")) == 2, "two learner ranks")
    descendants = run.descendants()
    assert run.wait() == 0, run.tail()

    lines = run.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["staleness/max"] <= 1 for line in lines)
    assert [line["sync/version"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["groups/trained"] == lines[-1]["groups/dispatched"] == 16
    assert all(line["rollout/soft_share"] > 0.2 for line in lines), "a silent fall-back to discrete rollouts"

    sample = pq.read_table(run_dir / "trajectories" / "step_000001.parquet")
    assert sample.num_rows == 4
    assert {"noise", "weights", "version_runs", "verdict"} <= set(sample.column_names)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["learner"]["world_size"] == 2
    checkpoint = run_dir / "checkpoints" / "step_000004"
    assert damage(checkpoint) is None
    assert load_state(checkpoint).counts["trained"] == 16
    with sqlite3.connect(run_dir.parent / "mlflow.db") as store:
        statuses = store.execute("select status from runs").fetchall()
        logged = store.execute("select count(*) from metrics where key = 'reward/mean'").fetchone()[0]
    assert statuses == [("FINISHED",)]
    assert logged == 4
    _, alive = _gone(descendants)
    assert not alive, f"left behind: {alive}"


def test_sigterm_stops_within_15_s_and_resume_goes_on(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "outputs" / "stopped"
    config = recipe(inputs, run_dir, steps=400)
    run = Run(config)
    run.wait_for_step(3)
    descendants = run.descendants()
    run.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert run.wait(deadline_s=30) == 75, run.tail()
    assert time.monotonic() - started < 15
    _, alive = _gone(descendants)
    assert not alive, f"left behind: {alive}"

    done = len(run.metrics())
    resumed = Run(config, f"steps={done + 2}", "--resume")
    assert resumed.wait() == 0, resumed.tail()
    steps = [line["step"] for line in resumed.metrics()]
    assert steps == list(range(1, done + 3)), "no step is repeated or skipped after a graceful stop"
    trained = [json.loads(line) for line in (run_dir / "groups.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in trained] == steps, "a step has trained twice"
    assert {line["attempt"] for line in trained} == {1, 2}
    committed_once(resumed, steps[-1])


def _gone(processes: list) -> tuple[list, list]:
    import psutil

    return psutil.wait_procs(processes, timeout=30)
