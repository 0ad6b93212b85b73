"""Fault matrix row 19 against a real MLflow server: killed in the middle of a run, restarted, nothing lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import pytest

from orchestration import mirror
from orchestration.config import parse_config
from orchestration.tracking import Tracker

SERVER_START_S = 120.0
DELIVERY_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.1)


@contextmanager
def mlflow_server(directory: Path, port: int) -> Iterator[None]:
    """A server that dies as a whole, without warning, at the end of the block."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{directory}/server.db", "--artifacts-destination", str(directory)]
    with (directory / "server.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: healthy(port), SERVER_START_S, f"the server; see {directory}/server.log")
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


@pytest.mark.chaos
def test_a_killed_server_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    for name, value in {"POLL_S": 0.1, "FIRST_PAUSE_S": 0.2, "LONGEST_PAUSE_S": 1.0}.items():
        monkeypatch.setattr(mirror, name, value)
    port = free_port()
    tracking = {"mlflow_uri": f"http://127.0.0.1:{port}"}
    config = parse_config(
        {
            "name": "t",
            "output_dir": str(tmp_path / "run"),
            "model": {"path": "m"},
            "data": {"train": {"path": "d"}},
            "tracking": tracking,
        },
        "test",
    )
    tracker = Tracker.open(config)
    with mlflow_server(tmp_path, port):
        for step in range(1, 11):
            tracker.log({"reward/mean": step}, step)
        wait_until(lambda: tracker.delivered_step == 10, DELIVERY_S, "the first ten steps")
    (tmp_path / "plot.png").write_bytes(b"png")
    tracker.artifact(tmp_path / "plot.png", "plots")
    for step in range(11, 21):
        tracker.log({"reward/mean": step}, step)
        time.sleep(0.2)
    assert tracker.delivered_step == 10
    with mlflow_server(tmp_path, port):
        wait_until(lambda: tracker.delivered_step == 20, DELIVERY_S, "the steps of the outage")
        tracker.close("FINISHED")
        client = MlflowClient(tracking["mlflow_uri"])
        run = client.get_run(str(tracker.mlflow_run_id))
        history = client.get_metric_history(run.info.run_id, "reward/mean")
        assert sorted({point.step for point in history}) == list(range(1, 21))
        assert run.info.status == "FINISHED"
        assert [file.path for file in client.list_artifacts(run.info.run_id, "plots")] == ["plots/plot.png"]
