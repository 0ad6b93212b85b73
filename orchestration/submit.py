"""`softgrpo submit`: a run as a Ray job, from a laptop to a cluster that has the dependencies and not the code.

    recipe -> checked here -> zip (code + resolved recipe) -> Jobs API -> driver on the head: train --config ...

Ray's submission ids are single-use; a run is known by its name and its run directory. Resuming therefore submits again,
with `--resume` and a new id. Exit codes with --follow are the driver's: 0 done, 75 stopped with a checkpoint, 2 wrong
configuration, 1 anything else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestration import preflight
from orchestration.code_package import WARN_ABOVE, build_package
from orchestration.config import Config, ConfigError, dump_config, load_config
from orchestration.kuberay import config_digest
from orchestration.kuberay_shutdown import STOP_WAIT_VARIABLE, job_stop_wait_s
from orchestration.redaction import SECRET_NAME
from orchestration.validate import require_trainable

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

logger = logging.getLogger(__name__)

EXIT_DONE, EXIT_ERROR, EXIT_CONFIG, EXIT_STOPPED, EXIT_DETACHED = 0, 1, 2, 75, 130
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
SUBMITTED_CONFIG = "submitted.yaml"
CONNECT_DEADLINE_S = 5.0
REQUEST_DEADLINE_S = 60.0
LOST_AFTER_S = 120.0
"""How long --follow tolerates an unreachable head."""
POLL_S = 1.0
FORWARDED = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
"""Taken from the caller's environment when set; never credentials, because everyone who reads the job sees them."""


@dataclass(frozen=True)
class Submission:
    """Everything that one job needs, before anything is sent."""

    submission_id: str
    entrypoint: str
    env_vars: dict[str, str]
    metadata: dict[str, str]


def main(arguments: Sequence[str]) -> int:
    """Submit, and with --follow wait for the end."""
    namespace = _parser().parse_intermixed_args(arguments)
    config = load_config(namespace.config, namespace.overrides)
    submission = plan_submission(
        config,
        resume=namespace.resume,
        entrypoint=namespace.entrypoint,
        env_vars=_environment(namespace.env),
        working_dir=namespace.working_dir,
    )
    address = find_address(namespace.address)
    client = connect(address)
    refuse_if_running(client, config.name)
    nodes = preflight.dashboard_nodes(address)
    logger.info("what the run asks and what the cluster has:\n%s", preflight.describe_room(config, nodes))
    with tempfile.TemporaryDirectory(prefix="softgrpo-submit-") as scratch:
        extra = {SUBMITTED_CONFIG: dump_config(config).encode()}
        package = build_package(namespace.working_dir, Path(scratch) / "code.zip", extra)
        if package.num_bytes > WARN_ABOVE:
            logger.warning("uploading %.0f MiB: %s", package.num_bytes / 2**20, package.describe_largest())
        client.submit_job(
            entrypoint=submission.entrypoint,
            submission_id=submission.submission_id,
            runtime_env={"working_dir": str(package.path), "env_vars": submission.env_vars},
            metadata=submission.metadata,
        )
    print(submission.submission_id)
    if not namespace.follow:
        logger.info("follow it with: ray job logs --follow --address %s %s", address, submission.submission_id)
        return EXIT_DONE
    try:
        return asyncio.run(follow(client, submission.submission_id))
    except KeyboardInterrupt:
        logger.warning(
            "detached; the job goes on. Stop it with: ray job stop --address %s %s", address, submission.submission_id
        )
        return EXIT_DETACHED


def plan_submission(
    config: Config, *, resume: bool, entrypoint: str | None, env_vars: Mapping[str, str], working_dir: Path
) -> Submission:
    """Check what a submitted job needs beyond a valid recipe. Raises `ConfigError`."""
    if not config.output_dir or not Path(config.output_dir).is_absolute():
        raise ConfigError(
            f"output_dir={config.output_dir}: a job's working directory vanishes with its node; set an absolute path "
            f"that survives it, such as output_dir=/mnt/shared/outputs/{config.name}"
        )
    if not working_dir.is_dir():
        raise ConfigError(f"--working-dir {working_dir}: no such directory")
    if entrypoint is None:
        require_trainable(config)
        if not (working_dir / "orchestration" / "__main__.py").is_file():
            raise ConfigError(f"--working-dir {working_dir}: is not a clone of softgrpo (orchestration/ is missing)")
        command = ["python", "-m", "orchestration", "train", "--config", SUBMITTED_CONFIG]
        entrypoint = shlex.join([*command, "--resume"] if resume else command)
    return Submission(
        submission_id=f"{config.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}",
        entrypoint=entrypoint,
        env_vars={"PYTHONUNBUFFERED": "1", STOP_WAIT_VARIABLE: str(job_stop_wait_s(config)), **env_vars},
        metadata={
            "softgrpo_run": config.name,
            "softgrpo_config": config_digest(config),
            "softgrpo_resume": str(resume).lower(),
            **_git_metadata(working_dir),
        },
    )


def find_address(given: str | None) -> str:
    """The dashboard's address: the option, Ray's variables, or the local head. Raises `ConfigError`."""
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is no number
        usable = False
    if not usable:
        raise ConfigError(f"--address {address}: give the dashboard's address, such as {DEFAULT_ADDRESS}")
    return address


def connect(address: str) -> JobSubmissionClient:
    """A client that was answered once. Raises `ConfigError` when nobody listens or the token is refused."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_DEADLINE_S).close()
    except OSError as error:
        raise ConfigError(
            f"--address {address}: no answer within {CONNECT_DEADLINE_S:.0f} s ({error}); start a head "
            "(`ray start --head`), or forward the port (`kubectl port-forward service/NAME-head-svc 8265`)"
        ) from None
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(module).setLevel(logging.WARNING)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # the client prefers the variable to its argument
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"--address {address}: the cluster refused the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a "
            f"file with the cluster's token ({str(error).splitlines()[0]})"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(f"--address {address}: is no Ray dashboard: {error}") from None


def refuse_if_running(client: JobSubmissionClient, run_name: str) -> None:
    """Two drivers of one run directory would fight for its lease. Raises `ConfigError`."""
    for job in client.list_jobs():
        if (job.metadata or {}).get("softgrpo_run") == run_name and not job.status.is_terminal():
            raise ConfigError(
                f"run {run_name} is {job.status.value} as {job.submission_id}; stop it with `ray job stop "
                f"{job.submission_id}`, or choose another name"
            )


def exit_code(job: JobDetails) -> int:
    """The contract's code of an ended job; a stopped one has no driver code of its own in Ray."""
    from ray.job_submission import JobStatus

    if job.status == JobStatus.SUCCEEDED:
        return EXIT_DONE
    if job.status == JobStatus.STOPPED:
        return EXIT_STOPPED
    return job.driver_exit_code if job.driver_exit_code in (EXIT_CONFIG, EXIT_STOPPED) else EXIT_ERROR


async def follow(client: JobSubmissionClient, submission_id: str) -> int:
    """Copy the driver's log to stdout until the job ends; its exit code."""
    printed = _PrintedLog()
    tail = asyncio.create_task(_tail(client, submission_id, printed), name="tail")
    try:
        job = await _wait_for_end(client, submission_id)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(tail), timeout=5.0)
    finally:
        tail.cancel()
    code = exit_code(job)
    reason = f": {(job.message or '').splitlines()[0]}" if code and job.message else ""
    logger.info("job %s %s (exit code %d)%s", submission_id, job.status.value, code, reason)
    if code == EXIT_STOPPED:
        logger.info("continue it with the same command and --resume")
    return code


async def _wait_for_end(client: JobSubmissionClient, submission_id: str) -> JobDetails:
    reached = time.monotonic()
    while True:
        try:
            job = await asyncio.wait_for(asyncio.to_thread(client.get_job_info, submission_id), REQUEST_DEADLINE_S)
            reached = time.monotonic()
            if job.status.is_terminal():
                return job
        except (OSError, RuntimeError, TimeoutError) as error:  # requests' errors are OSErrors
            if "does not exist" in str(error):
                raise ConnectionError(f"the cluster does not know job {submission_id}: was it replaced?") from error
            silent_s = time.monotonic() - reached
            if silent_s > LOST_AFTER_S:
                raise ConnectionError(
                    f"no answer from the head for {silent_s:.0f} s while following {submission_id}: {error}; the "
                    f"job may still run, see `ray job status {submission_id}`"
                ) from error
        await asyncio.sleep(POLL_S)


class _PrintedLog:
    """Prints a log that is delivered from its beginning on every connection, each character once."""

    def __init__(self) -> None:
        self.total = 0
        self._seen = 0

    def start(self) -> None:
        self._seen = 0

    def add(self, text: str) -> None:
        self._seen += len(text)
        new = self._seen - self.total
        if new > 0:
            sys.stdout.write(text[-new:])
            sys.stdout.flush()
            self.total = self._seen


async def _tail(client: JobSubmissionClient, submission_id: str, printed: _PrintedLog) -> None:
    """Follow the log stream; a broken one is opened again (it is known to break on long jobs)."""
    import aiohttp

    while True:
        printed.start()
        try:
            async for text in client.tail_job_logs(submission_id):
                printed.add(text)
            return
        except (RuntimeError, aiohttp.ClientError, OSError) as error:
            logger.debug("log stream of %s broke: %s", submission_id, error)
        await asyncio.sleep(POLL_S)


def _environment(entries: Sequence[str]) -> dict[str, str]:
    """Forwarded variables and those given by --env (`NAME=VALUE`, or `NAME` to copy)."""
    variables = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: is not set here; write --env {name}=VALUE")
        variables[name] = value if equals else os.environ[name]
        if SECRET_NAME.search(name):
            logger.warning("--env %s: everyone who can read the cluster's jobs will see its value", name)
    uri = variables.get("MLFLOW_TRACKING_URI", "")
    if urlsplit(uri).password:
        raise ConfigError(
            "MLFLOW_TRACKING_URI holds a password, which would be stored with the job; set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD in the cluster's environment instead"
        )
    return variables


def _git_metadata(working_dir: Path) -> dict[str, str]:
    import subprocess

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(working_dir), *command], capture_output=True, text=True, timeout=30, check=False
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"git_commit": commit, "git_dirty": str(bool(git("status", "--porcelain", "-uno"))).lower()}


def _parser() -> argparse.ArgumentParser:
    from orchestration.cli import recipe_parser

    parser = recipe_parser("submit", "Run a recipe as a Ray job; the code goes along, images carry dependencies.")
    parser.add_argument("--address", metavar="URL", help=f"dashboard of the cluster (default {DEFAULT_ADDRESS})")
    parser.add_argument("--follow", action="store_true", help="print the driver's log; exit as the driver did")
    parser.add_argument("--resume", action="store_true", help="continue the run of this name from its last checkpoint")
    parser.add_argument("--working-dir", type=Path, default=Path("."), metavar="DIR", help="clone to run (default .)")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="variable of the driver and all actors"
    )
    parser.add_argument(
        "--entrypoint", metavar="COMMAND", help=f"run this instead of train --config {SUBMITTED_CONFIG}"
    )
    return parser
