"""Jobs that end before their time: stopped (row 23: checkpoint within the stop wait) or with their head (row 14)."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from orchestration import submit
from orchestration.kuberay_stop import stop_all_jobs
from tests.end_to_end.recipes import ROOT, make_inputs, recipe
from tests.orchestration.ray_head import ray_head

pytestmark = [pytest.mark.slow, pytest.mark.chaos]


def steps_of(run_dir: Path) -> list[int]:
    """Steps in metrics.jsonl, in order."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def submit_until(step: int, arguments: list[str], run_dir: Path, address: str, capsys: Any) -> str:
    """Submit, and wait until that step is done; the submission id."""
    capsys.readouterr()
    assert submit.main(arguments) == 0
    submission_id: str = capsys.readouterr().out.split()[0]
    deadline = time.monotonic() + 240
    while len(steps_of(run_dir)) < step:
        assert time.monotonic() < deadline, submit.connect(address).get_job_logs(submission_id)
        time.sleep(0.5)
    return submission_id


def test_stop_and_resume_under_a_new_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run_dir = tmp_path / "run"
    config = recipe(make_inputs(tmp_path / "inputs"), run_dir, steps=5000, checkpoint__every_steps=1000)
    monkeypatch.chdir(ROOT)
    with ray_head(num_cpus=8) as head:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
        arguments = ["--config", str(config), "--address", head.address]
        first = submit_until(3, arguments, run_dir, head.address, capsys)
        started = time.monotonic()
        assert stop_all_jobs(head.address, 60) == 0
        assert time.monotonic() - started < 45
        assert asyncio.run(submit.follow(submit.connect(head.address), first)) == 75
        done = steps_of(run_dir)[-1]
        assert (run_dir / "checkpoints" / f"step_{done:06d}" / "manifest.json").is_file(), "no step may be repeated"

        assert submit.main([*arguments, f"steps={done + 3}", "--resume", "--follow"]) == 0
        second = capsys.readouterr().out.split()[0]
        assert second != first
        assert steps_of(run_dir) == list(range(1, done + 4))


def test_a_lost_head_and_a_new_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Everything of the first cluster is killed at once; a second one goes on from the run directory."""
    run_dir, every = tmp_path / "run", 2
    config = recipe(make_inputs(tmp_path / "inputs"), run_dir, steps=5000, checkpoint__every_steps=every)
    monkeypatch.chdir(ROOT)
    with ray_head(num_cpus=8) as head:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
        submit_until(5, ["--config", str(config), "--address", head.address], run_dir, head.address, capsys)
    done = steps_of(run_dir)[-1]
    with ray_head(num_cpus=8) as head:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
        arguments = ["--config", str(config), "--address", head.address, f"steps={done + 2}", "--resume", "--follow"]
        assert submit.main(arguments) == 0
    steps = steps_of(run_dir)
    assert set(steps) == set(range(1, done + 3))
    assert len(steps) - len(set(steps)) <= every, "more steps were repeated than lie between two checkpoints"
