"""Every way out of `softgrpo train`: the exit code, the tracker's verdict, a last line that says what to do."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from learner.spec import LearnerError
from orchestration import run_state, train
from orchestration.cli import EXIT_CONFIG, EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, main
from orchestration.config import Config, ConfigError
from orchestration.failures import PoolExhausted
from orchestration.run_state import RunDirectory, RunState
from orchestration.stopping import StopSignals
from tests.orchestration.simulation import simulated_config

NOTHING_YET = "there is no checkpoint; --resume starts from the beginning"


class Attempt(train.TrainingRun):
    """An attempt whose work is given; nothing of Ray is started."""

    def __init__(self, place: Path, work: Callable[[], Awaitable[None]], **changes: Any) -> None:
        self.config = simulated_config(place, **changes)
        self.directory = RunDirectory(place)
        self.verdicts: list[str] = []
        self.tracker: Any = SimpleNamespace(close=self.verdicts.append)
        self.groups: Any = SimpleNamespace(close=lambda: None)
        self.watchdog: Any = SimpleNamespace(start=lambda loop: None, stop=lambda: None)
        self.controller = self.evaluation = None
        self.signals = StopSignals()
        self.stopping = False
        self._given = work

    async def _work(self) -> None:
        await self._given()


def run(attempt: Attempt) -> int:
    with attempt.signals.caught():
        return asyncio.run(attempt.run())


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
        (stopped, EXIT_STOPPED, "KILLED", f"stopped; {NOTHING_YET}"),
        (
            failing(PoolExhausted("budget spent")),
            EXIT_ERROR,
            "FAILED",
            f"failed; {NOTHING_YET}",
        ),
        (
            failing(LearnerError("rank 0 died")),
            EXIT_ERROR,
            "FAILED",
            f"failed; {NOTHING_YET}",
        ),
        (
            failing(KeyError("a bug")),
            EXIT_ERROR,
            "FAILED",
            f"failed; {NOTHING_YET}",
        ),
    ],
)
def test_codes_and_last_words(
    work: Any, code: int, verdict: str, last_word: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    attempt = Attempt(tmp_path, work)
    assert run(attempt) == code
    assert attempt.verdicts == [verdict], "the tracker is closed on every way out"
    messages = [record.getMessage() for record in caplog.records if record.name == train.__name__]
    assert (messages[-1] if messages else None) == last_word
    if code == EXIT_ERROR:
        assert len(messages) == 2, "what failed, then what to do"


def test_a_configuration_error_found_late_is_still_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data may turn out to have changed when the stream is restored: 2, so that nobody tries again."""
    attempt = Attempt(tmp_path, failing(ConfigError("the training data changed")))
    monkeypatch.setattr("orchestration.cli.train", lambda arguments: run(attempt))
    assert main(["train"]) == EXIT_CONFIG
    assert attempt.verdicts == ["FAILED"]


def test_the_last_word_names_the_last_checkpoint_without_reading_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    attempt = Attempt(tmp_path, stopped)
    with attempt.directory.new_checkpoint(RunState(7, 7, {}), 2):
        pass
    monkeypatch.setattr(run_state, "damage", lambda path: pytest.fail("a large state takes minutes"))
    assert run(attempt) == EXIT_STOPPED
    assert caplog.messages[-1] == "stopped; continue with --resume from step_000007"


def test_pools_that_cannot_be_killed_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ray may be gone: the others are killed, the tracker is closed, the code is that of the run."""

    def gone() -> None:
        raise RuntimeError("the GCS is gone")

    attempt = Attempt(tmp_path, done)
    killed: list[str] = []
    attempt.rollout = SimpleNamespace(kill=gone)  # type: ignore[assignment]
    attempt.learner = SimpleNamespace(kill=lambda: killed.append("learner"))  # type: ignore[assignment]
    assert run(attempt) == EXIT_DONE
    assert killed == ["learner"] and attempt.verdicts == ["FINISHED"]
    assert "rollout: its actors cannot be killed" in caplog.text
    attempt = Attempt(tmp_path, done)
    attempt.evaluation = SimpleNamespace(cancel=gone)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="gone"):
        run(attempt)
    assert attempt.verdicts == ["FINISHED"], "closed whatever happens"


@pytest.mark.parametrize("end", ["a stop", "an error"])
def test_the_last_step_and_checkpoint_have_their_grace_and_no_more(
    end: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finished: list[bool] = []

    async def finish() -> None:
        await asyncio.sleep(9)
        finished.append(True)

    async def work() -> None:
        if end == "an error":
            raise PoolExhausted("budget spent")
        os.kill(os.getpid(), signal.SIGTERM)
        await finish()

    attempt = Attempt(tmp_path, work, checkpoint__stop_grace_s=0.3)
    slots = SimpleNamespace(training=False)
    attempt.controller = SimpleNamespace(request_stop=lambda: None, checkpoint=finish, slots=slots)  # type: ignore[assignment]
    attempt.learner = SimpleNamespace(alive=True, kill=lambda: None)  # type: ignore[assignment]
    assert run(attempt) == (EXIT_STOPPED if end == "a stop" else EXIT_ERROR)
    assert not finished
    assert ("no checkpoint at the end" in caplog.text) == (end == "an error")


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """`run_training` without a model, data and Ray; each stage may do something of its own."""
    return Prepared(simulated_config(tmp_path), monkeypatch)


class Prepared:
    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = config
        self.at: dict[str, Callable[[], object]] = {}
        resolved = SimpleNamespace(warnings=(), require_complete=lambda: self._reached("validate", resolved))
        monkeypatch.setattr(train, "validate", lambda config: resolved)
        monkeypatch.setattr(train, "connected", self._connected)
        monkeypatch.setattr(train, "with_end_of_thinking", lambda given, place: self._reached("add tokens", given))
        monkeypatch.setattr(train, "TrainingRun", self._training_run)

    def _reached(self, stage: str, value: Any = None) -> Any:
        self.at.get(stage, lambda: None)()
        return value

    @contextmanager
    def _connected(self, config: Config) -> Iterator[None]:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # as ray.init does
        try:
            self._reached("wait for room")
            yield
        finally:
            self._reached("shutdown")

    def _training_run(self, resolved: Any, directory: RunDirectory, signals: StopSignals, *, resume: bool) -> Any:
        directory.resume_point()
        attempt = Attempt(directory.path, done)
        attempt.signals = signals
        return attempt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["wait for room", "add tokens"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_stop_before_the_run_is_up_can_be_resumed(
    prepared: Prepared, stage: str, steps: int, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    directory = RunDirectory(prepared.config.run_dir)
    if steps:
        directory.create(prepared.config, resume=False)
        with directory.new_checkpoint(RunState(steps, steps, {}), 2):
            pass
    shut_down: list[bool] = []
    prepared.at = {
        stage: lambda: os.kill(os.getpid(), number),
        "shutdown": lambda: shut_down.append(terminate() is None),
    }
    assert train.run_training(prepared.config, resume=steps > 0) == EXIT_STOPPED
    rest = "continue with --resume" if steps else NOTHING_YET
    assert caplog.messages[-1] == f"stopped before the first step; {rest}"
    assert shut_down or stage == "wait for room", "a second signal does not interrupt that"
    prepared.at = {}
    assert train.run_training(prepared.config, resume=True) == EXIT_DONE


def test_a_stop_before_anything_was_started_leaves_nothing(
    prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    prepared.at["validate"] = terminate
    assert train.run_training(prepared.config, resume=False) == EXIT_ERROR
    assert caplog.messages[-1] == "stopped before anything was started; run the same command again"
    assert not prepared.config.run_dir.exists()


def test_a_stop_after_the_run_has_ended_changes_nothing(prepared: Prepared) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    prepared.at["shutdown"] = terminate
    assert train.run_training(prepared.config, resume=False) == EXIT_DONE
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_mistyped_run_is_not_resumed_and_nothing_is_made(prepared: Prepared) -> None:
    with pytest.raises(ConfigError, match="nothing to resume there"):
        train.run_training(prepared.config, resume=True)
    assert not prepared.config.run_dir.exists()


def test_a_busy_run_directory_is_an_error_without_a_stack(prepared: Prepared) -> None:
    with RunDirectory(prepared.config.run_dir).lease():
        assert train.run_training(prepared.config, resume=False) == EXIT_ERROR


@pytest.mark.parametrize("place", ["the directory", "the lock"])
def test_a_disk_that_takes_nothing_at_the_start_is_an_error_without_a_stack(
    prepared: Prepared, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC if place == "the directory" else errno.ENOLCK, "no")

    if place == "the directory":
        monkeypatch.setattr(run_state, "write_atomically", refuse)
    else:
        monkeypatch.setattr(run_state.fcntl, "flock", refuse)
    assert train.run_training(prepared.config, resume=False) == EXIT_ERROR
    assert caplog.messages[-1].startswith("the run cannot start: ")
    assert caplog.records[-1].exc_info is None
