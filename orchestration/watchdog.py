"""Says who waits for what when nothing moves: a registry of waits, and a thread that looks at it.

    with waiting_for("4 groups of step 12", who="learner", deadline_s=600):
        await changed.wait()

The watchdog never interrupts anything; deadlines in the code do that. It reports, once per stall and then at growing
intervals, every open wait, the stack of every thread and of every asyncio task (down to what each one awaits). The
thread also runs while the event loop is blocked, which is when it is needed most. `kill -USR1 PID` asks for a report.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 5.0
REPEAT_FACTOR = 2.0
"""The second report of one stall comes after twice its age, the third after four times."""


@dataclass(frozen=True, slots=True)
class Wait:
    """One open wait."""

    who: str
    what: str
    deadline_s: float
    """Seconds after which it counts as a stall."""
    since: float
    """Monotonic time."""

    def describe(self, now: float) -> str:
        """`learner waits for 4 groups of step 12: 612 s of 600 s`."""
        return f"{self.who} waits for {self.what}: {now - self.since:.0f} s of {self.deadline_s:.0f} s"


@dataclass(slots=True)
class WaitRegistry:
    """Open waits of this process; may be used from any thread."""

    _waits: dict[int, Wait] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def waiting_for(self, what: str, *, who: str, deadline_s: float) -> Iterator[None]:
        """Register a wait for the duration of the block."""
        number = next(self._numbers)
        self._waits[number] = Wait(who, what, deadline_s, time.monotonic())
        try:
            yield
        finally:
            del self._waits[number]

    def open_waits(self) -> list[tuple[int, Wait]]:
        """(number, wait), oldest first."""
        return sorted(self._waits.copy().items(), key=lambda item: item[1].since)


WAITS = WaitRegistry()
"""The process's registry."""
waiting_for = WAITS.waiting_for


class Watchdog:
    """Reports waits beyond their deadline, and the absence of progress, as errors in the log."""

    def __init__(
        self,
        *,
        progress_deadline_s: float | None = None,
        registry: WaitRegistry = WAITS,
        check_every_s: float = CHECK_EVERY_S,
    ) -> None:
        """`progress_deadline_s` is how long `progress` may stay silent; None does not expect any."""
        self.num_reports = 0
        """Exported as a metric: a run that recovers from stalls still has a problem."""
        self._registry = registry
        self._check_every_s = check_every_s
        self._progress_deadline_s = progress_deadline_s
        self._last_progress = ("the start", time.monotonic())
        self._next_report: dict[int | str, float] = {}
        """Wait number or `progress` -> age in seconds at which it is reported next."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = threading.Event()
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Watch until `stop`; `loop` is the event loop whose tasks belong into reports."""
        self._loop = loop
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, lambda number, frame: self._asked.set())
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(timeout=self._check_every_s + 5.0)

    def progress(self, what: str) -> None:
        """Something moved: `what` names it in a later report (`step 12`)."""
        self._last_progress = (what, time.monotonic())
        self._next_report.pop("progress", None)

    def stalls(self, now: float) -> list[str]:
        """What is late at `now` and due for a report."""
        open_waits = self._registry.open_waits()
        ages: dict[int | str, tuple[float, float, str]] = {
            number: (now - wait.since, wait.deadline_s, wait.describe(now)) for number, wait in open_waits
        }
        if self._progress_deadline_s is not None:
            what, since = self._last_progress
            ages["progress"] = (
                now - since,
                self._progress_deadline_s,
                f"no progress for {now - since:.0f} s, since {what}",
            )
        self._next_report = {key: age for key, age in self._next_report.items() if key in ages}
        due = []
        for key, (age, deadline_s, text) in ages.items():
            if age > self._next_report.get(key, deadline_s):
                self._next_report[key] = age * REPEAT_FACTOR
                due.append(text)
        return due

    def report(self, reasons: list[str]) -> str:
        """The text of a report: what is late, every open wait, every stack."""
        now = time.monotonic()
        waits = [f"  {wait.describe(now)}" for _, wait in self._registry.open_waits()] or ["  (none)"]
        lines = ["stalled: " + "; ".join(reasons), "open waits:", *waits]
        lines += ["asyncio tasks:", *_task_stacks(self._loop)] if self._loop else []
        return "\n".join([*lines, "threads:", *_thread_stacks()])

    def _watch(self) -> None:
        while not self._ended.wait(self._check_every_s if not self._asked.is_set() else 0):
            reasons = self.stalls(time.monotonic())
            if self._asked.is_set():
                self._asked.clear()
                logger.warning("%s", self.report(["asked by SIGUSR1", *reasons]))
            elif reasons:
                logger.error("%s", self.report(reasons))
                self.num_reports += 1  # after the report: who sees the count may let go of what the report describes


def _thread_stacks() -> list[str]:
    frames = sys._current_frames()
    own = threading.get_ident()
    lines = []
    for thread in threading.enumerate():
        if thread.ident in frames and thread.ident != own:
            lines += [f"  {thread.name}:", *_indented(traceback.extract_stack(frames[thread.ident]))]
    return lines


def _task_stacks(loop: asyncio.AbstractEventLoop) -> list[str]:
    lines = []
    for task in sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name()):
        lines += [f"  {task.get_name()}:", *_indented(coroutine_stack(task.get_coro()))]
    return lines


def coroutine_stack(coroutine: Any) -> traceback.StackSummary:
    """Frames from a suspended coroutine down to what it awaits; `Task.get_stack` shows only the outermost."""
    frames: list[tuple[FrameType, int]] = []
    while coroutine is not None:
        frame = next(
            (found for name in ("cr_frame", "gi_frame", "ag_frame") if (found := getattr(coroutine, name, None))), None
        )
        if frame is None:
            break
        frames.append((frame, frame.f_lineno))
        coroutine = next(
            (below for name in ("cr_await", "gi_yieldfrom", "ag_await") if (below := getattr(coroutine, name, None))),
            None,
        )
    return traceback.StackSummary.extract(iter(frames))


def _indented(stack: traceback.StackSummary) -> list[str]:
    return [f"    {line}" for entry in stack.format() for line in entry.rstrip().splitlines()]
