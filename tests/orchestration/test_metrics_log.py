"""metrics.jsonl: append-only, whole lines, one record per step for readers."""

from __future__ import annotations

import errno
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from orchestration import metrics_log
from orchestration.metrics_log import MetricsLog, read_metrics


def test_lines_are_flat_records(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl", attempt=3)
    log.append({"reward/mean": 1, "kl/mean": math.inf}, 7)
    log.close()
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert abs(record.pop("time") - time.time()) < 60
    assert record == {"step": 7, "attempt": 3, "reward/mean": 1.0, "kl/mean": None, "nonfinite/kl/mean": 1.0}


def test_flush_means_on_disk(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", attempt=1)
    for step in range(500):
        log.append({"a/b": step}, step)
    assert log.flush()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 500
    log.close()


def test_what_is_no_number_is_refused_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", attempt=1)
    with pytest.raises((TypeError, ValueError)):
        log.append({"a/b": "many"}, 1)  # type: ignore[dict-item]
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_torn_line_is_cut_off_and_a_damaged_one_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a/b": 1}\nnot json\n{"step": 2, "a/')
    log = MetricsLog(path, attempt=2)
    log.append({"a/b": 5}, 2)
    log.close()
    assert "torn last line of 15 bytes" in caplog.text
    assert [(record["step"], record["a/b"]) for record in read_metrics(path)] == [(1, 1), (2, 5.0)]
    assert "damaged line" in caplog.text


def test_readers_see_a_repeated_step_once(tmp_path: Path) -> None:
    for attempt, steps in ((1, (1, 2, 3)), (2, (3, 4))):
        log = MetricsLog(tmp_path / "metrics.jsonl", attempt=attempt)
        for step in steps:
            log.append({"a/b": attempt}, step)
        log.close()
    assert [(record["step"], record["a/b"]) for record in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
    ]
    assert read_metrics(tmp_path / "nowhere.jsonl") == []


def test_a_full_disk_delays_lines_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics_log, "RETRY_EVERY_S", 0.01)
    log = MetricsLog(tmp_path / "metrics.jsonl", attempt=1)
    log._lines._file = disk = FullDisk(log._lines._file, room=30)
    for step in range(5):
        log.append({"a/b": step}, step)
    assert not log.flush(timeout_s=0.2), "flush does not claim what is not on disk"
    disk.room = 10_000
    assert log.flush()
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert caplog.text.count("cannot write") == 1, "once for the whole outage"


def test_a_run_that_ends_on_a_full_disk_says_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", attempt=1)
    log._lines._file = FullDisk(log._lines._file, room=0)
    for step in range(5):
        log.append({"a/b": step}, step)
    log.close()
    assert "the disk did not take the last 5 lines" in caplog.text


class FullDisk:
    """Takes `room` bytes, the last of them as half a line, then refuses."""

    def __init__(self, file: Any, room: int) -> None:
        self.file = file
        self.room = room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "no space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return int(taken)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
