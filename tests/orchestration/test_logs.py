"""Log lines: who, which policy, no secrets; a stream that fails costs lines only."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration import logs
from orchestration.plan import as_member
from rollout.weights import VERSION_VARIABLE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def untouched_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    os.environ.pop(VERSION_VARIABLE, None)  # an actor that another test ran in this process has left one
    yield
    root.handlers[:], root.level = handlers, level
    os.environ.pop(VERSION_VARIABLE, None)


def lines_of(pool: str, rank: int | None, monkeypatch: pytest.MonkeyPatch, fmt: str = "text") -> io.StringIO:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, fmt)
    stream = io.StringIO()
    logs.configure(pool, rank, stream=stream)
    return stream


def test_text_names_pool_rank_and_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = lines_of("rollout", 1, monkeypatch)
    logger = logging.getLogger("rollout.actor")
    logger.info("before")
    logger.info("swapped", extra={"policy_version": 12})
    logs.set_policy_version(13)
    logger.warning("after %d s", 3)
    first, second, third = stream.getvalue().splitlines()
    assert first.endswith(" I rollout[1] rollout.actor: before")
    assert second.endswith(" I rollout[1] v12 rollout.actor: swapped")
    assert third.endswith(" W rollout[1] v13 rollout.actor: after 3 s")


def test_json_keeps_the_extra_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = lines_of("driver", None, monkeypatch, "json")
    logging.getLogger("x").error("group %s failed", "g1", extra={"policy_version": 4, "group_id": "g1"})
    (line,) = stream.getvalue().splitlines()
    fields = json.loads(line)
    assert {key: fields[key] for key in ("level", "pool", "policy_version", "logger", "message", "group_id")} == {
        "level": "ERROR",
        "pool": "driver",
        "policy_version": 4,
        "logger": "x",
        "message": "group g1 failed",
        "group_id": "g1",
    }
    assert "rank" not in fields
    assert fields["time"].endswith("Z")


def test_tracebacks_stay_on_one_json_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = lines_of("driver", None, monkeypatch, "json")
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        logging.getLogger("x").exception("it failed")
    (line,) = stream.getvalue().splitlines()
    assert "RuntimeError: boom" in json.loads(line)["message"]


def test_the_format_follows_ray_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(logs.FORMAT_VARIABLE, raising=False)
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "JSON")
    assert isinstance(logs.choose_formatter("driver", None), logs.JsonFormatter)
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "text")
    assert isinstance(logs.choose_formatter("driver", None), logs.TextFormatter)


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_secrets_never_reach_a_line(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-of-the-hub")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-of-mlflow")
    stream = lines_of("driver", None, monkeypatch, fmt)
    try:
        raise RuntimeError("401 for canary-of-the-hub")
    except RuntimeError:
        logging.getLogger("x").exception("tried canary-of-mlflow at http://me:hidden@server/")
    assert "canary" not in stream.getvalue()
    assert "hidden" not in stream.getvalue()


class Full(io.StringIO):
    """A disk without room."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_costs_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logs.LossyHandler(Full())
    logger = logging.getLogger("full")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        logger.error("lost")
        logger.error("lost too")
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    assert handler.num_lost == 2
    assert capsys.readouterr().err == ""


def test_the_log_is_copied_into_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = lines_of("driver", None, monkeypatch)
    with logs.also_to(tmp_path / "driver.log"):
        logging.getLogger("x").info("inside")
    logging.getLogger("x").info("outside")
    with logs.also_to(tmp_path / "driver.log"):
        logging.getLogger("x").info("a second attempt")
    copied = (tmp_path / "driver.log").read_text(encoding="utf-8")
    assert [line.rpartition(": ")[2] for line in copied.splitlines()] == ["inside", "a second attempt"]
    assert stream.getvalue().count("\n") == 3


def test_a_worker_learns_who_it_is_from_its_environment() -> None:
    """Also what it learns later: a learner's rank when its process group forms, the policy that an engine serves."""
    code = """
import logging, os
from orchestration.logs import setup_worker
setup_worker()
os.environ |= {"RANK": "3", "SOFTGRPO_POLICY_VERSION": "7"}
logging.info("here")
"""
    environment = {**os.environ, logs.POOL_VARIABLE: "learner", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().endswith("I learner[3] v7 root: here")


def test_pool_members_are_told_their_index() -> None:
    options = {"num_cpus": 1, "runtime_env": {"env_vars": {logs.POOL_VARIABLE: "verifier"}}}
    assert as_member(options, 2) == {
        "num_cpus": 1,
        "runtime_env": {"env_vars": {logs.POOL_VARIABLE: "verifier", logs.RANK_VARIABLE: "2"}},
    }


@pytest.mark.slow
def test_ray_workers_run_the_hook(tmp_path: Path) -> None:
    """In a driver of its own, because a cluster's hook is fixed by its first `ray.init`."""
    code = f"""
import logging, ray
hook = {{"env_vars": {{"PYTHONPATH": {str(ROOT)!r}}}, "worker_process_setup_hook": "orchestration.logs.setup_worker"}}
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=hook)

@ray.remote
class Actor:
    def look(self):
        formatter = logging.getLogger().handlers[0].formatter
        return type(formatter).__name__, formatter.pool, formatter.rank

options = {{"runtime_env": {{"env_vars": {{"SOFTGRPO_POOL": "rollout", "SOFTGRPO_RANK": "1"}}}}}}
print(*ray.get(Actor.options(**options).remote().look.remote(), timeout=60))
"""
    environment = {**os.environ, logs.FORMAT_VARIABLE: "text"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.stdout.strip() == "TextFormatter rollout 1", done.stderr[-2000:]
