"""`metrics.jsonl`: the append-only record of a run, and the truth that every mirror is filled from.

One line per logged step: {"step": 3, "time": 1763693000.1, "attempt": 1, "reward/mean": 0.5, ...}. A value that is not
finite is null, beside `nonfinite/<name>` = 1. `append` never waits for the disk: a writer thread writes at once and
syncs every few seconds, so a killed process loses at most the lines of the last milliseconds and a lost machine those
of the last seconds. A line that was torn by a crash is cut off when the log is opened again. What a full disk does not
take waits in memory and is written, in order, once there is room; a run that ends before that says how much it lost.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

FSYNC_EVERY_S = 2.0
RETRY_EVERY_S = 1.0
RESERVED = ("step", "time", "attempt")
logger = logging.getLogger(__name__)

_Item = dict[str, Any] | threading.Event | None
"""A record ({} when none came in time), a request to sync, or the end."""


class MetricsLog:
    """Appends to one file from any thread."""

    def __init__(self, path: Path, *, attempt: int) -> None:
        self.path = path
        self.attempt = attempt
        self._lines = LineFile(path)
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_forever, name="metrics-log", daemon=True)
        self._thread.start()

    def append(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one step; returns at once. Raises TypeError for a value that is no number."""
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3), "attempt": self.attempt}
        for name, value in metrics.items():
            number = float(value)
            if math.isfinite(number):
                record[name] = number
            else:
                record[name] = None
                record[f"nonfinite/{name}"] = 1.0
        self._queue.put(record)

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until all that was appended is on disk; False if that took longer than `timeout_s`."""
        done = threading.Event()
        self._queue.put(done)
        return done.wait(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is left and stop."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error("%s: the disk did not take all metrics within %.0f s", self.path, timeout_s)

    def _write_forever(self) -> None:
        synced_at = time.monotonic()
        while True:
            item = self._next_item(RETRY_EVERY_S if self._lines.unwritten else FSYNC_EVERY_S)
            self._lines.add(item if isinstance(item, dict) else {})
            if not isinstance(item, dict) or time.monotonic() - synced_at > FSYNC_EVERY_S:
                synced = self._lines.sync()
                synced_at = time.monotonic()
                if isinstance(item, threading.Event) and synced:
                    item.set()
            if item is None:
                self._lines.close()
                return

    def _next_item(self, timeout_s: float) -> _Item:
        try:
            return self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return {}


class LineFile:
    """A file of JSON lines that is appended to; what a full disk does not take waits in memory, in order.

    A line that a crash tore is cut off when the file is opened again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unwritten = b""
        self._refused = False
        """Whether the disk took nothing at the last attempt: said once per outage."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a record and what waits before it ({}: only that), as far as the disk takes them; never raises."""
        if record:
            self.unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        while self.unwritten:
            try:
                self.unwritten = self.unwritten[self._file.write(self.unwritten) :]  # a full disk may take half a line
            except OSError as error:
                if not self._refused:
                    logger.error("%s: cannot write (%s), trying again", self.path, error)
                self._refused = True
                return
        self._refused = False

    def sync(self) -> bool:
        """Whether all that was added is on the disk itself."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.error("%s: cannot sync: %s", self.path, error)
            return False
        return not self.unwritten

    def close(self) -> None:
        """No more lines; says how many the disk did not take."""
        if self.unwritten:
            logger.error("%s: the disk did not take the last %d lines", self.path, self.unwritten.count(b"\n"))
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One record per step, in order; where a resumed run repeated a step, its latest attempt counts."""
    latest: dict[int, dict[str, Any]] = {}
    if path.is_file():
        with path.open("rb") as file:
            for _, record in complete_lines(file):
                if record:
                    latest.setdefault(record["step"], {}).update(record)
    return [latest[step] for step in sorted(latest)]


def complete_lines(file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset behind the line, record) of every complete line from the file's position on; {} for a damaged one."""
    offset = file.tell()
    for line in file:
        if not line.endswith(b"\n"):
            return
        offset += len(line)
        try:
            record = json.loads(line)
        except ValueError:
            logger.error("skipped a damaged line of metrics before offset %d", offset)
            record = {}
        yield offset, record


def _cut_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            logger.warning("%s: cut off a torn last line of %d bytes", path, len(content) - end)
            file.truncate(end)
