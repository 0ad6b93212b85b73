"""Tracking: an outage costs lag, never a step and never data; one MLflow run per logical run; no secret leaves."""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration import mirror as mirror_module
from orchestration import tracking
from orchestration.config import Config, ConfigError, dump_config, parse_config
from orchestration.metrics_log import read_metrics
from orchestration.mlflow_sink import flatten, sanitise
from orchestration.tracking import Tracker, send_rest
from tests.orchestration.fake_mlflow import FakeMlflow

DEADLINE_S = 20.0


def configure(run_dir: Path, **sections: Any) -> Config:
    tree = {
        "name": "t",
        "output_dir": str(run_dir),
        "model": {"path": "m"},
        "data": {"train": {"path": "d"}},
        "tracking": sections.pop("tracking", {}),
        **sections,
    }
    return parse_config(tree, "test")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.02)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow  # noqa: F401  (its first import takes longer than these tests are willing to wait)

    for name, value in {"POLL_S": 0.02, "FIRST_PAUSE_S": 0.05, "LONGEST_PAUSE_S": 0.2}.items():
        monkeypatch.setattr(mirror_module, name, value)
    monkeypatch.setattr(tracking, "CLOSE_S", 2.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


@pytest.fixture
def server(tmp_path: Path, impatient: None) -> Iterator[FakeMlflow]:
    fake = FakeMlflow(tmp_path / "artifacts")
    yield fake
    fake.stop()


def open_tracker(run_dir: Path, server: FakeMlflow) -> Tracker:
    return Tracker.open(configure(run_dir, tracking={"mlflow_uri": server.uri}), datasets=[("gsm8k", "abc", "/data")])


def log_steps(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log({"reward/mean": step / 10, "pass@1": 0.5}, step)


def test_a_run_reaches_the_server_whole(server: FakeMlflow, tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path / "run", server)
    log_steps(tracker, range(1, 6))
    (tmp_path / "plot.png").write_bytes(b"png")
    tracker.artifact(tmp_path / "plot.png", "plots")
    wait_until(lambda: server.steps == [1, 2, 3, 4, 5], "five steps")
    tracker.close("FINISHED")
    (run,) = server.runs.values()
    assert run["status"] == "FINISHED" and run["datasets"] == ["gsm8k"]
    assert run["params"]["algorithm.group_size"] == "8" and run["params"]["name"] == "t"
    assert run["tags"]["softgrpo.attempt"] == "1" and "version.ray" in run["tags"]
    assert {metric["key"] for metric in server.metrics} == {"reward/mean", "pass_at_1", "tracking/lag_steps"}
    assert (tmp_path / "artifacts" / run["run_id"] / "plots" / "plot.png").read_bytes() == b"png"


@pytest.mark.parametrize("trouble", ["refuse", "hang", "500", "503"])
def test_an_outage_costs_lag_and_nothing_else(server: FakeMlflow, tmp_path: Path, trouble: str) -> None:
    tracker = open_tracker(tmp_path / "run", server)
    log_steps(tracker, range(1, 4))
    wait_until(lambda: server.steps == [1, 2, 3], "the first steps")
    if trouble == "refuse":
        server.stop()
    else:
        server.mode = trouble
    seconds = []
    for step in range(4, 104):
        began = time.perf_counter()
        tracker.log({"reward/mean": step / 10}, step)
        seconds.append(time.perf_counter() - began)
        time.sleep(0.002)
    assert statistics.quantiles(seconds, n=20)[-1] < 0.05, "logging waited (1 ms is meant; a busy machine has pauses)"
    assert server.steps == [1, 2, 3]
    tracker.flush()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["tracking/lag_steps"] > 50
    if trouble == "refuse":
        server.start()
    server.mode = "ok"
    server.release.set()
    wait_until(lambda: len(set(server.steps)) == 103, "all steps after the outage")
    assert sorted(set(server.steps)) == list(range(1, 104))
    tracker.close("FINISHED")
    assert [run["status"] for run in server.runs.values()] == ["FINISHED"]


@pytest.mark.parametrize("trouble", ["refuse", "hang"])
def test_closing_during_an_outage_is_bounded_and_the_rest_can_be_sent_later(
    server: FakeMlflow, tmp_path: Path, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(tmp_path / "run", tracking={"mlflow_uri": server.uri})
    if trouble == "refuse":
        server.stop()
    server.mode = trouble
    tracker = Tracker.open(config)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    log_steps(tracker, range(1, 4))
    (tmp_path / "report.md").write_text("report")
    tracker.artifact(tmp_path / "report.md")
    began = time.monotonic()
    tracker.close("KILLED")
    assert time.monotonic() - began < 2 * tracking.CLOSE_S
    assert "did not take everything in time" in caplog.text
    if trouble == "refuse":
        server.start()
    server.mode = "ok"
    server.release.set()
    assert send_rest(tmp_path / "run", timeout_s=DEADLINE_S)
    assert sorted(set(server.steps)) == [1, 2, 3]
    (run,) = server.runs.values()
    assert run["status"] == "KILLED"
    assert (tmp_path / "artifacts" / run["run_id"] / "report.md").read_text() == "report"


def test_a_resumed_run_is_the_same_run(server: FakeMlflow, tmp_path: Path) -> None:
    for attempt, steps in enumerate((range(1, 4), range(3, 6)), start=1):
        tracker = open_tracker(tmp_path / "run", server)
        log_steps(tracker, steps)
        wait_until(lambda steps=steps: steps[-1] in server.steps, "the attempt's steps")
        assert tracker.mlflow_run_id in server.runs
        tracker.close("FAILED" if attempt == 1 else "FINISHED")
    (run,) = server.runs.values()
    assert run["status"] == "FINISHED" and run["tags"]["softgrpo.attempt"] == "2"
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(record["step"], record["attempt"]) for record in records] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_a_lost_state_file_still_finds_the_run_by_its_key(server: FakeMlflow, tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path / "run", server)
    wait_until(lambda: tracker.mlflow_run_id is not None, "the run")
    tracker.close("KILLED")
    file = tmp_path / "run" / "tracking.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "run_id": None}))
    tracker = open_tracker(tmp_path / "run", server)
    wait_until(lambda: tracker.mlflow_run_id is not None, "the run again")
    tracker.close("FINISHED")
    assert len(server.runs) == 1


def test_a_damaged_state_file_costs_a_new_entry_and_no_metrics(server: FakeMlflow, tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path / "run", server)
    log_steps(tracker, range(1, 3))
    tracker.close("KILLED")
    (tmp_path / "run" / "tracking.json").write_text("{damaged")
    tracker = open_tracker(tmp_path / "run", server)
    wait_until(lambda: server.steps[-2:] == [1, 2] and len(server.runs) == 2, "the history in a new run")
    tracker.close("FINISHED")


@pytest.mark.parametrize("loss", ["damaged", "gone"])
def test_a_checkpoint_brings_a_lost_state_file_back(server: FakeMlflow, tmp_path: Path, loss: str) -> None:
    """The same run, no step sent twice but those after the checkpoint."""
    run_dir, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_000003"
    tracker = open_tracker(run_dir, server)
    log_steps(tracker, range(1, 4))
    wait_until(lambda: tracker.delivered_step == 3, "the steps")
    tracker.flush()
    checkpoint.mkdir(parents=True)
    shutil.copy(run_dir / "tracking.json", checkpoint)
    log_steps(tracker, range(4, 6))
    wait_until(lambda: 5 in server.steps, "steps after the checkpoint")
    tracker.close("KILLED")
    (run_dir / "tracking.json").unlink()
    if loss == "damaged":
        (run_dir / "tracking.json").write_text("{dam")
    config = configure(run_dir, tracking={"mlflow_uri": server.uri})
    tracker = Tracker.open(config, checkpoint=checkpoint)
    log_steps(tracker, range(6, 7))
    wait_until(lambda: 6 in server.steps, "the next step")
    assert tracker.attempt == 2
    tracker.close("FINISHED")
    assert len(server.runs) == 1
    assert server.steps == [1, 2, 3, 4, 5, 4, 5, 6]


def test_a_flush_has_metrics_and_cursor_on_disk(
    server: FakeMlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = open_tracker(tmp_path / "run", server)
    wait_until(lambda: tracker.mlflow_run_id is not None, "the run")
    tracker.artifact(tmp_path / "later.png")
    log_steps(tracker, range(1, 4))
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    tracker.flush()
    state = json.loads((tmp_path / "run" / "tracking.json").read_text())
    assert state["run_id"] == tracker.mlflow_run_id and state["attempt"] == 1
    assert {str(tmp_path / "run" / "metrics.jsonl"), str(tmp_path / "run")} <= set(synced)
    assert any(path.endswith(".tracking.json.writing") for path in synced), "it survives a power cut"
    tracker.close("FINISHED")


def test_a_full_disk_at_a_checkpoint_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker.open(configure(tmp_path / "run", tracking={"mlflow": False}))
    tracker._log.flush = lambda: False  # type: ignore[method-assign]
    tracker.flush()
    assert "does not take the metrics in time" in caplog.text
    tracker.close("FINISHED")


def test_another_server_gets_the_whole_history(server: FakeMlflow, tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path / "run", server)
    log_steps(tracker, range(1, 4))
    wait_until(lambda: len(server.steps) == 3, "three steps")
    tracker.close("KILLED")
    other = FakeMlflow(tmp_path / "other")
    tracker = open_tracker(tmp_path / "run", other)
    tracker.log({"reward/mean": 1}, 4)
    wait_until(lambda: other.steps == [1, 2, 3, 4], "the history")
    tracker.close("FINISHED")
    other.stop()


@pytest.mark.parametrize("rejected", [None, "runs/create"])
def test_what_refuses_a_run_is_reported_once_and_not_tried_for_ever(
    rejected: str | None, server: FakeMlflow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong credentials, or an experiment that somebody deleted."""
    server.mode, server.rejected_calls = ("ok", {rejected}) if rejected else ("401", set())
    tracker = open_tracker(tmp_path / "run", server)
    wait_until(lambda: "MLflow refuses this run" in caplog.text, "the report")
    requests = server.requests
    log_steps(tracker, range(1, 50))
    time.sleep(0.3)
    tracker.close("FINISHED")
    assert server.requests == requests
    assert caplog.text.count("MLflow refuses this run") == 1 and "in time" not in caplog.text
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 49


def test_a_refused_metric_does_not_stop_the_others(
    server: FakeMlflow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.rejected_names = {"odd/name"}
    tracker = open_tracker(tmp_path / "run", server)
    tracker.log({"odd/name": 1}, 1)
    wait_until(lambda: "rejected" in caplog.text, "the rejection")
    tracker.log({"reward/mean": 1}, 2)
    wait_until(lambda: server.steps == [2], "the next step")
    tracker.close("FINISHED")


def test_secrets_never_leave(
    server: FakeMlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    canaries = {
        "HF_TOKEN": "hf_canary_1",
        "AWS_SECRET_ACCESS_KEY": "canary/2+x",
        "MLFLOW_TRACKING_PASSWORD": "canary3!",
    }
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("://", "://me:canary4@"))
    config = configure(
        tmp_path / "run",
        data={"train": {"path": "hf_canary_1/x"}, "system_prompt": "canary3!"},
    )
    tracker = Tracker.open(config, tags={"note": "token is canary/2+x", "api_key": "anything"})
    log_steps(tracker, range(1, 3))
    wait_until(lambda: 2 in server.steps, "the steps")
    server.mode = "500"
    log_steps(tracker, range(3, 5))
    time.sleep(0.2)
    tracker.close("FAILED")
    written = "".join(file.read_text() for file in (tmp_path / "run").iterdir())
    for canary in (*canaries.values(), "canary4", "anything"):
        assert canary not in "".join(server.bodies), "sent"
        assert canary not in written, "written"
        assert canary not in caplog.text, "logged"
    (run,) = server.runs.values()
    assert run["params"]["data.system_prompt"] == "<redacted>"
    with pytest.raises(ConfigError, match=r"tracking\.mlflow_uri holds a password") as error:
        configure(tmp_path / "run", tracking={"mlflow_uri": "https://me:canary5@host"})
    assert "canary5" not in str(error.value)


def test_sqlite_is_the_default_store(tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking, "CLOSE_S", 60.0)
    run_dir = tmp_path / "outputs" / "t"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("name: t\n")
    tracker = Tracker.open(configure(run_dir, tracking={"registered_model": "tiny", "experiment": "other"}))
    tracker.log({"reward/mean": 0.5, "kl/mean": float("nan")}, 1)
    tracker.register_model(tmp_path / "model")
    (tmp_path / "plot.png").write_bytes(b"png")
    tracker.artifact(tmp_path / "plot.png", "plots")
    tracker.close("FINISHED")
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'other'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "t"
    assert run.data.metrics["reward/mean"] == 0.5 and run.data.metrics["nonfinite/kl/mean"] == 1
    files = [file.path for folder in ("config", "plots") for file in client.list_artifacts(run.info.run_id, folder)]
    assert files == ["config/config.yaml", "plots/plot.png"]
    (model,) = client.search_model_versions("name = 'tiny'")
    assert (model.source, model.run_id) == ((tmp_path / "model").as_uri(), run.info.run_id)
    assert (tmp_path / "outputs" / "mlartifacts").is_dir() and not Path("mlruns").exists()


def test_without_mlflow_only_the_log_is_written(tmp_path: Path) -> None:
    tracker = Tracker.open(configure(tmp_path / "run", tracking={"mlflow": False}))
    tracker.log({"reward/mean": 1}, 1)
    tracker.artifact(tmp_path / "nothing")
    tracker.close("FINISHED")
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (record["step"], record["reward/mean"], tracker.mlflow_run_id) == (1, 1.0, None)


def test_names_and_params_that_mlflow_accepts() -> None:
    assert sanitise("pass@1") == "pass_at_1"
    assert sanitise("kl{x}/../y") == "kl_x_/../y"
    flat = flatten({"a": {"b": [1, 2], "c": {}, "d": None}, "e": "x" * 7000, "f": True})
    assert flat["a.b"] == "[1, 2]" and flat["a.c"] == "{}" and flat["a.d"] == "null" and flat["f"] == "true"
    assert len(flat["e"]) < 6000 and flat["e"] != flatten({"e": "x" * 6999 + "y"})["e"]
