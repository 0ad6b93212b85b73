"""Every way out of `softgrpo train`: the exit code, the tracker's verdict, a last line that says what to do."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from learner.spec import LearnerError
from orchestration import train
from orchestration.cli import EXIT_CONFIG, EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, main
from orchestration.config import ConfigError
from orchestration.failures import PoolExhausted
from orchestration.run_state import RunDirectory
from tests.orchestration.simulation import simulated_config


class Attempt(train.TrainingRun):
    """An attempt whose work is given; nothing of Ray is started."""

    def __init__(self, place: Path, work: Callable[[], Awaitable[None]]) -> None:
        self.config = simulated_config(place)
        self.directory = RunDirectory(place)
        self.verdicts: list[str] = []
        self.tracker: Any = SimpleNamespace(close=self.verdicts.append)
        self.groups: Any = SimpleNamespace(close=lambda: None)
        self.watchdog: Any = SimpleNamespace(start=lambda loop: None, stop=lambda: None)
        self.controller = self.evaluation = None
        self.stopping = False
        self._given = work

    async def _work(self) -> None:
        await self._given()


async def done() -> None:
    return


async def stopped() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(30)


def failing(error: Exception) -> Callable[[], Awaitable[None]]:
    async def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "verdict", "last_word"),
    [
        (done, EXIT_DONE, "FINISHED", None),
        (stopped, EXIT_STOPPED, "KILLED", "stopped; there is no checkpoint"),
        (failing(PoolExhausted("budget spent")), EXIT_ERROR, "FAILED", "failed; there is no checkpoint"),
        (failing(LearnerError("rank 0 died")), EXIT_ERROR, "FAILED", "failed; there is no checkpoint"),
        (failing(KeyError("a bug")), EXIT_ERROR, "FAILED", "failed; there is no checkpoint"),
    ],
)
def test_codes_and_last_words(
    work: Any, code: int, verdict: str, last_word: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    attempt = Attempt(tmp_path, work)
    assert asyncio.run(attempt.run()) == code
    assert attempt.verdicts == [verdict], "the tracker is closed on every way out"
    messages = [record.getMessage() for record in caplog.records if record.name == train.__name__]
    assert (messages[-1] if messages else None) == last_word
    if code == EXIT_ERROR:
        assert len(messages) == 2, "what failed, then what to do"


def test_a_configuration_error_found_late_is_still_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data may turn out to have changed when the stream is restored: 2, so that nobody tries again."""
    attempt = Attempt(tmp_path, failing(ConfigError("the training data changed")))
    monkeypatch.setattr("orchestration.cli.train", lambda arguments: asyncio.run(attempt.run()))
    assert main(["train"]) == EXIT_CONFIG
    assert attempt.verdicts == ["FAILED"]


def test_a_busy_run_directory_is_an_error_without_a_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = simulated_config(tmp_path)
    resolved = SimpleNamespace(warnings=(), require_complete=lambda: resolved)
    monkeypatch.setattr(train, "validate", lambda config: resolved)
    with RunDirectory(config.run_dir).lease():
        assert train.run_training(config, resume=False) == EXIT_ERROR
