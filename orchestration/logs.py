"""Logging of every process of a run: pool, rank and policy version on each line, as text or as JSON.

    2026-11-21 03:40:12 I rollout[1] v12 rollout.actor: swapped weights
    {"time": "...", "level": "INFO", "pool": "rollout", "rank": "1", "policy_version": 12, "message": ...}

The driver calls `configure`; workers get `setup_worker` as Ray's process hook, so no pool imports this module: their
environment says who they are, also when that changes (a learner rank learns its RANK late, a rollout actor serves one
policy after the other). A line says which policy it is about with `extra={"policy_version": n}`, or the driver does for
all of its lines with `set_policy_version`. Secrets of the environment never reach a line, and a full disk
costs lines, not the run.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from orchestration.redaction import SECRET_NAME, redact_text
from rollout.weights import VERSION_VARIABLE

POOL_VARIABLE = "SOFTGRPO_POOL"
RANK_VARIABLE = "SOFTGRPO_RANK"
FORMAT_VARIABLE = "SOFTGRPO_LOG_FORMAT"
"""`text` or `json`; otherwise Ray's own RAY_LOGGING_CONFIG_ENCODING decides."""
QUIET = {
    "urllib3": logging.WARNING,
    "alembic": logging.WARNING,
    "mlflow": logging.WARNING,
    "vllm": logging.WARNING,
    "DeepSpeed": logging.WARNING,
}
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "policy_version", "taskName"}


def set_policy_version(version: int) -> None:
    """The policy that this process works with from now on."""
    os.environ[VERSION_VARIABLE] = str(version)


def configure(pool: str, rank: str | int | None = None, *, stream: TextIO | None = None) -> None:
    """Send this process's log to `stream` (default stderr), replacing what was set up before."""
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")  # otherwise it prints lines of its own format
    handler = LossyHandler(stream or sys.stderr)
    handler.setFormatter(choose_formatter(pool, None if rank is None else str(rank)))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)


def setup_worker() -> None:
    """Ray's `worker_process_setup_hook`: pool and rank come from the actor's environment."""
    configure(os.environ.get(POOL_VARIABLE, "worker"))


@contextmanager
def also_to(path: Path) -> Iterator[None]:
    """Copy the log into a file for the duration of the block: a head pod's own log vanishes with it."""
    handler = LossyHandler(path.open("a", encoding="utf-8"))
    root = logging.getLogger()
    handler.setFormatter(root.handlers[0].formatter if root.handlers else choose_formatter("driver", None))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.stream.close()


class LossyHandler(logging.StreamHandler[TextIO]):
    """Drops lines that the stream does not take (disk full, pipe closed) instead of disturbing the run."""

    num_lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        """Called inside an except block by `emit`; anything but a failing stream is a bug in the call, so show it."""
        if isinstance(sys.exc_info()[1], OSError | ValueError):  # ValueError: the stream is closed
            self.num_lost += 1
        else:
            super().handleError(record)


def choose_formatter(pool: str, rank: str | None) -> ContextFormatter:
    """Text, or JSON where the environment asks for it."""
    ray_encoding = os.environ.get("RAY_LOGGING_CONFIG_ENCODING", "TEXT")
    wanted = os.environ.get(FORMAT_VARIABLE, ray_encoding).lower()
    return (JsonFormatter if wanted == "json" else TextFormatter)(pool, rank)


class ContextFormatter(logging.Formatter):
    """Knows who logs, for which policy, and what must not be shown."""

    def __init__(self, pool: str, rank: str | None, environment: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.pool = pool
        self._rank = rank
        environment = os.environ if environment is None else environment
        self._secrets = {name: value for name, value in environment.items() if SECRET_NAME.search(name)}

    @property
    def rank(self) -> str | None:
        """Which member of its pool this is."""
        return self._rank or os.environ.get(RANK_VARIABLE) or os.environ.get("RANK")

    def version_of(self, record: logging.LogRecord) -> int | None:
        """The policy version of a line."""
        version: int | None = getattr(record, "policy_version", None)
        if version is None and (text := os.environ.get(VERSION_VARIABLE)):
            return int(text)
        return version

    def text_of(self, record: logging.LogRecord) -> str:
        """Message and traceback without secrets."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return redact_text(text, self._secrets)


class TextFormatter(ContextFormatter):
    """One readable line."""

    def format(self, record: logging.LogRecord) -> str:
        """See the module's example."""
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        version = self.version_of(record)
        who = self.pool if self.rank is None else f"{self.pool}[{self.rank}]"
        policy = "" if version is None else f" v{version}"
        return f"{clock} {record.levelname[0]} {who}{policy} {record.name}: {self.text_of(record)}"


class JsonFormatter(ContextFormatter):
    """One JSON object a line; `extra` fields are kept."""

    def format(self, record: logging.LogRecord) -> str:
        """See the module's example."""
        fields: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "pool": self.pool,
            "rank": self.rank,
            "policy_version": self.version_of(record),
            "logger": record.name,
            "message": self.text_of(record),
        }
        extra = {key: value for key, value in vars(record).items() if key not in STANDARD}
        line = {**{key: value for key, value in fields.items() if value is not None}, **extra}
        return json.dumps(line, default=str)
