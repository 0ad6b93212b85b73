"""The mirror: whatever its sink does, every line arrives once and in order, and what cannot is said."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration import mirror as mirror_module
from orchestration.metrics_log import MetricsLog
from orchestration.mirror import Mirror, MirrorState
from orchestration.mlflow_sink import RunDescription, SinkRejected, SinkUnavailable
from tests.orchestration.test_tracking import DEADLINE_S, wait_until

RUN = RunDescription("t", "e", "key", None, {}, {})


class MoodySink:
    """Fails as told, call by call, and keeps what it accepted."""

    def __init__(self, moods: Sequence[str]) -> None:
        self.moods = list(moods)
        self.steps: list[int] = []
        self.status: str | None = None

    def start(self, run: RunDescription) -> str:
        self._feel()
        return "run0"

    def log_records(self, records: Sequence[Mapping[str, Any]]) -> None:
        mood = self._feel()
        self.steps += [record["step"] for record in records]
        if mood == "accepts, then fails":
            raise SinkUnavailable("after the fact")

    def log_artifact(self, path: Path, folder: str) -> None:
        self._feel()

    def register_model(self, name: str, directory: Path) -> None:
        self._feel()

    def finish(self, status: str) -> None:
        self._feel()
        self.status = status

    def _feel(self) -> str:
        mood = self.moods.pop(0) if self.moods else "fine"
        if mood == "fails":
            raise SinkUnavailable("moody")
        if mood == "breaks":
            raise OSError("metrics.jsonl: input/output error")
        if mood == "rejects":
            raise SinkRejected("moody")
        return mood


@settings(max_examples=25, deadline=None)
@given(
    moods=st.lists(st.sampled_from(["fine", "fails", "breaks", "accepts, then fails"]), max_size=8),
    stop=st.integers(1, 30),
    lines=st.integers(1, 7),
)
def test_whatever_fails_every_line_arrives_in_order(
    tmp_path_factory: pytest.TempPathFactory, moods: list[str], stop: int, lines: int
) -> None:
    directory = tmp_path_factory.mktemp("run")
    log = MetricsLog(directory / "metrics.jsonl", attempt=1)
    sink = MoodySink(moods)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror_module, "POLL_S", 0.001)
        patch.setattr(mirror_module, "FIRST_PAUSE_S", 0.001)
        patch.setattr(mirror_module, "LONGEST_PAUSE_S", 0.001)
        patch.setattr(mirror_module, "LINES_PER_BATCH", lines)
        for first, last in ((1, stop), (stop, 30)):
            mirror = Mirror(sink, RUN, MirrorState.load(directory), directory)
            mirror.start()
            for step in range(first, last):
                log.append({"reward/mean": step}, step)
            log.flush()
            wait_until(lambda mirror=mirror, last=last: mirror.delivered_step >= last - 1, f"step {last - 1}")
            sink.moods.clear()
            assert mirror.close("FINISHED", DEADLINE_S)
    log.close()
    assert sink.status == "FINISHED"
    assert list(dict.fromkeys(sink.steps)) == list(range(1, 30))


class StuckSink(MoodySink):
    """Takes a long time over its first call."""

    def __init__(self) -> None:
        super().__init__([])
        self.entered = threading.Event()
        self.release = threading.Event()

    def log_records(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.entered.set()
        assert self.release.wait(DEADLINE_S)
        super().log_records(records)


def test_a_call_that_returns_after_closing_changes_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", attempt=1)
    log.append({"reward/mean": 1}, 1)
    log.close()
    sink = StuckSink()
    mirror = Mirror(sink, RUN, MirrorState(), tmp_path)
    mirror.start()
    assert sink.entered.wait(DEADLINE_S)
    assert not mirror.close("KILLED", 0.1)
    state = MirrorState.load(tmp_path)
    assert (state.cursor, state.final_status) == (0, "KILLED")
    sink.release.set()
    wait_until(lambda: sink.steps == [1], "the late answer")
    time.sleep(0.1)
    assert MirrorState.load(tmp_path) == state, "another process may be using this file by now"
    assert sink.status is None


def test_a_vanished_or_rejected_artifact_is_reported_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror_module, "POLL_S", 0.02)
    sink = MoodySink(["fine", "rejects"])
    mirror = Mirror(sink, RUN, MirrorState(), tmp_path)
    (tmp_path / "there").touch()
    mirror.add_artifact(tmp_path / "gone", "x")
    mirror.add_artifact(tmp_path / "there", "x")
    mirror.start()
    wait_until(lambda: "MLflow rejected" in caplog.text, "the rejection")
    assert mirror.close("FINISHED", DEADLINE_S)
    assert "gone vanished before it could be uploaded" in caplog.text


@pytest.mark.parametrize("torn", [0, 7])
def test_a_log_that_lost_its_end_to_a_power_cut_is_sent_on_from_there(tmp_path: Path, torn: int) -> None:
    """tracking.json was synced, the last lines of metrics.jsonl were not: no later line is passed over or cut."""
    log = MetricsLog(tmp_path / "metrics.jsonl", attempt=1)
    for step in range(1, 11):
        log.append({"reward/mean": step}, step)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    MirrorState(run_id="run0", cursor=sum(map(len, lines)), delivered_step=10).save(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:torn])
    state = MirrorState.load(tmp_path)
    assert state.cursor == sum(map(len, lines[:6]))
    log = MetricsLog(tmp_path / "metrics.jsonl", attempt=2)
    sink = MoodySink([])
    mirror = Mirror(sink, RUN, state, tmp_path)
    mirror.start()
    for step in range(7, 16):
        log.append({"a/longer": step}, step)
    log.close()
    assert mirror.close("FINISHED", DEADLINE_S)
    assert sink.steps == list(range(7, 16))
    cut = MirrorState(cursor=state.cursor + 5)
    cut.save(tmp_path)
    assert MirrorState.load(tmp_path).cursor == state.cursor, "never in the middle of a line"
