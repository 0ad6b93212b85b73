"""`softgrpo submit`: checks before anything is sent, and real jobs on a real head with token authentication."""

from __future__ import annotations

import asyncio
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration import submit
from orchestration.config import Config, ConfigError, parse_config
from orchestration.kuberay_stop import stop_all_jobs
from orchestration.submit import exit_code, find_address, plan_submission
from tests.orchestration.ray_head import Head, free_ports

TREE: dict[str, Any] = {"name": "run", "model": {"path": "m"}, "data": {"train": {"path": "d.parquet"}}}

DRIVER = """
import json, os, signal, sys, time
print("python", sys.argv[1:], "wait", os.environ["RAY_JOB_STOP_WAIT_TIME_S"], flush=True)
if sys.argv[1] == "look":
    metadata = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]
    print("metadata", metadata["softgrpo_run"], metadata["job_submission_id"], flush=True)
    print("files", sorted(os.listdir(".")), "secret", os.environ.get("EXTRA"), flush=True)
    sys.exit(0)
if sys.argv[1] == "exit":
    sys.exit(int(sys.argv[2]))
def stop(signum, frame):
    time.sleep(5)  # longer than the 3 s that Ray gives by default
    open(sys.argv[2], "w").write("checkpoint")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("running", flush=True)
time.sleep(120)
"""


def recipe(**keys: Any) -> Config:
    return parse_config(TREE | keys, "recipe")


def plan(config: Config, working_dir: Path, **keys: Any) -> submit.Submission:
    options: dict[str, Any] = {"resume": False, "entrypoint": None, "env_vars": {}} | keys
    return plan_submission(config, working_dir=working_dir, **options)


def clone(directory: Path) -> Path:
    (directory / "orchestration").mkdir(parents=True, exist_ok=True)
    (directory / "orchestration" / "__main__.py").write_text("", encoding="utf-8")
    (directory / "driver.py").write_text(DRIVER, encoding="utf-8")
    return directory


@pytest.mark.parametrize("output_dir", [None, "outputs/run"])
def test_a_run_directory_that_vanishes_is_refused(output_dir: str | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vanishes with its node; set an absolute path"):
        plan(recipe(output_dir=output_dir), clone(tmp_path))


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a clone of softgrpo"):
        plan(recipe(output_dir="/shared/run"), tmp_path)
    with pytest.raises(ConfigError, match="no such directory"):
        plan(recipe(output_dir="/shared/run"), tmp_path / "absent")


def test_what_cannot_train_is_refused_here(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.answer\.temperature=0"):
        plan(recipe(output_dir="/shared/run", sampling={"answer": {"temperature": 0}}), clone(tmp_path))
    other = recipe(output_dir="/shared/run", sampling={"answer": {"temperature": 0}})
    assert plan(other, clone(tmp_path), entrypoint="python -m orchestration evaluate"), (
        "a command of one's own need not"
    )


def test_stop_wait_covers_the_last_checkpoint(tmp_path: Path) -> None:
    short = plan(recipe(output_dir="/shared/run"), clone(tmp_path))
    long = plan(recipe(output_dir="/shared/run", checkpoint={"stop_grace_s": 300}), clone(tmp_path))
    assert short.env_vars["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    assert long.env_vars["RAY_JOB_STOP_WAIT_TIME_S"] == "330"


def test_resuming_is_a_new_submission_of_the_same_run(tmp_path: Path) -> None:
    config = recipe(output_dir="/shared/run")
    first, second = plan(config, clone(tmp_path)), plan(config, clone(tmp_path), resume=True)
    assert first.submission_id != second.submission_id
    assert first.metadata["softgrpo_run"] == second.metadata["softgrpo_run"] == "run"
    assert first.metadata["softgrpo_config"] == second.metadata["softgrpo_config"]
    assert second.entrypoint == "python -m orchestration train --config submitted.yaml --resume"


def test_environment_forwards_no_credentials(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary")
    monkeypatch.setenv("HF_TOKEN", "canary")
    assert submit._environment(["A=1"]) == {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "A": "1"}
    assert submit._environment(["HF_TOKEN"])["HF_TOKEN"] == "canary"
    assert "HF_TOKEN: everyone who can read" in caplog.text
    assert "canary" not in caplog.text
    with pytest.raises(ConfigError, match="--env ABSENT: is not set here"):
        submit._environment(["ABSENT"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:canary@mlflow:5000")
    with pytest.raises(ConfigError, match="holds a password") as caught:
        submit._environment([])
    assert "canary" not in str(caught.value)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert find_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://cluster:8265")
    assert find_address(None) == "http://cluster:8265"
    assert find_address("https://other") == "https://other"
    for address in ("10.0.0.1:6379", "http://127.0.0.1:abc", "http://[bad", "http://"):
        with pytest.raises(ConfigError, match="give the dashboard's address"):
            find_address(address)


def test_nobody_listening_is_said_within_seconds() -> None:
    (port,) = free_ports(1)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"no answer within 5 s .* start a head"):
        submit.connect(f"http://127.0.0.1:{port}")
    assert time.monotonic() - started < 8


@pytest.mark.parametrize(
    ("status", "driver", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("STOPPED", None, 75),
        ("FAILED", 75, 75),
        ("FAILED", 2, 2),
        ("FAILED", 7, 1),
        ("FAILED", None, 1),
    ],
)
def test_exit_codes_of_the_contract(status: str, driver: int | None, expected: int) -> None:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobStatus

    job = JobDetails(type="SUBMISSION", status=JobStatus(status), entrypoint="x", driver_exit_code=driver)
    assert exit_code(job) == expected


def test_a_reopened_log_stream_prints_every_character_once(capsys: pytest.CaptureFixture[str]) -> None:
    printed = submit._PrintedLog()
    printed.start()
    printed.add("one ")
    printed.start()
    for text in ("one", " two ", "three"):
        printed.add(text)
    assert capsys.readouterr().out == "one two three"


@pytest.fixture
def head(job_head: Head) -> str:
    """The dashboard's address."""
    return job_head.address


@pytest.fixture
def submit_here(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Submit the little driver above to the head, as the command does."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head)
    monkeypatch.chdir(clone(tmp_path / "clone"))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(TREE), encoding="utf-8")

    def run(name: str, command: str, *options: str) -> int:
        arguments = ["--config", str(file), f"name={name}", f"output_dir={tmp_path}/out", "--address", head]
        return submit.main([*arguments, "--entrypoint", f"python driver.py {command}", *options])

    return run


@pytest.mark.slow
def test_jobs_on_a_real_head(
    submit_here: Any, head: str, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Exit codes, the code archive of rendered RayJobs on a shared volume, and what a driver sees, side by side."""
    caplog.set_level("INFO")
    ids = {}
    for code in (75, 2, 7):
        assert submit_here(f"code{code}", f"exit {code}") == 0
        ids[code] = capsys.readouterr().out.splitlines()[0]
    assert "rollout: 1 x (1 CPU): the nodes hold 0; lower rollout.num_actors" in caplog.text
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        archive.writestr("softgrpo/driver.py", "print('from the archive')")
    client = submit.connect(head)
    ids[0] = client.submit_job(
        entrypoint="python driver.py", runtime_env={"working_dir": f"file://{tmp_path}/code.zip"}
    )
    assert submit_here("look", "look", "--follow", "--env", "EXTRA=plain") == 0
    output = capsys.readouterr().out
    submission_id = output.splitlines()[0]
    assert submission_id.startswith("look-")
    assert f"metadata look {submission_id}" in output
    assert "wait 60" in output
    assert "files ['driver.py', 'orchestration', 'submitted.yaml'] secret plain" in output

    async def all_codes() -> list[int]:
        return await asyncio.gather(*(submit.follow(client, one) for one in ids.values()))

    assert asyncio.run(all_codes()) == [75, 2, 1, 0]
    assert "from the archive" in client.get_job_logs(ids[0])


@pytest.mark.slow
def test_stopping_leaves_time_for_the_checkpoint(
    submit_here: Any, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also what the head pod's preStop hook does; and a run cannot be submitted twice at once."""
    checkpoint = tmp_path / "checkpoint"
    assert submit_here("stopped", f"run {checkpoint}") == 0
    submission_id = capsys.readouterr().out.splitlines()[0]
    client = submit.connect(head)
    deadline = time.monotonic() + 60
    while "running" not in client.get_job_logs(submission_id):
        assert time.monotonic() < deadline, "the driver did not start"
        time.sleep(0.3)
    with pytest.raises(ConfigError, match=f"run stopped is RUNNING as {submission_id}"):
        submit_here("stopped", f"run {checkpoint}")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # as in a head pod, where it names the GCS
    assert stop_all_jobs(head, 40) == 0
    assert checkpoint.read_text(encoding="utf-8") == "checkpoint"
    assert asyncio.run(submit.follow(client, submission_id)) == 75


@pytest.mark.slow
def test_a_wrong_token_is_refused_with_the_fix(head: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    token = tmp_path / "token"
    token.write_text("not-the-token-of-this-cluster", encoding="utf-8")
    code = (
        "import sys\nfrom orchestration.config import ConfigError\nfrom orchestration.submit import connect\n"
        "try:\n    connect(sys.argv[1])\nexcept ConfigError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(token)}
    done = subprocess.run(
        [sys.executable, "-c", code, head], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "the cluster refused the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in done.stdout, done.stderr
