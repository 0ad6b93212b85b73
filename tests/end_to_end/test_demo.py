"""The demo learns: real Ray, vLLM, DeepSpeed and MLflow, from a warm start to a held-out evaluation."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.metrics_log import read_metrics
from tests.end_to_end.recipes import ROOT

pytestmark = pytest.mark.slow
DEADLINE_S = 540.0


def demo(place: Path, *arguments: str) -> str:
    """Run `softgrpo demo` in a directory of its own; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "orchestration", "demo", *arguments]
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def test_the_demo_learns(tmp_path: Path) -> None:
    # With a plateau after them and a second engine it would be the recipe itself.
    printed = demo(tmp_path, "--seed", "0", "steps=24", "rollout.num_actors=1")
    run_dir = tmp_path / "outputs" / "demo"
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["before"], summary["after"]
    assert 0.25 <= before["pass@1"] <= 0.55, "the warm start must leave something to learn"
    assert after["pass@1"] >= 0.80
    assert after["pass@1"] >= before["pass@1"] + 0.30
    assert after["pass@16"] >= before["pass@16"] - 0.05
    assert after["mean_length"] > before["mean_length"] + 1, "the careful strategies are longer"

    lines = list(read_metrics(run_dir / "metrics.jsonl"))
    steps = [line for line in lines if "staleness/max" in line]
    assert max(line["staleness/max"] for line in steps) <= 1
    assert all(line["rollout/soft_share"] > 0.1 for line in steps), "a silent fall-back to discrete rollouts"
    assert (run_dir / "plots" / "curves.png").stat().st_size > 10_000
    assert "Pass@1" in printed and str(Path("plots") / "curves.png") in printed and "mlflow" in printed
    with sqlite3.connect(tmp_path / "outputs" / "mlflow.db") as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
        assert store.execute("select count(*) from metrics where key='reward/mean'").fetchone()[0] == len(steps)
