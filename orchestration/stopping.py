"""Signals that end an attempt, from its first moment to its last: a request while the run takes one, before it an exit.

    validate, lease, ray.init, waiting for room   sys.exit: nothing to finish, whatever was opened is closed on the way
    the run                                       its own request: finish the step, checkpoint
    ray.shutdown                                  ignored: the exit code is settled

Ray puts handlers of its own in place in `ray.init`, which also end in sys.exit (after killing a cluster of our own) but
with codes of Ray's: nobody should read them. `install` puts ours back.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from orchestration.checkpoints import all_in
from orchestration.run_state import RunDirectory

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """SIGINT and SIGTERM of one attempt. Main thread only."""

    def __init__(self) -> None:
        self._ask: Callable[[], object] | None = None
        self._over = False
        """The attempt ends already: one signal must not interrupt what another one began."""

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handle them for the duration of the block."""
        earlier = {number: signal.getsignal(number) for number in NUMBERS}
        self.install()
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Handle them from now on, whoever did before."""
        for number in NUMBERS:
            signal.signal(number, self._handle)

    @contextmanager
    def asking(self, request: Callable[[], None]) -> Iterator[None]:
        """Inside the block a signal calls `request` on the running event loop; after it they are ignored."""
        loop = asyncio.get_running_loop()
        self._ask = lambda: loop.call_soon_threadsafe(request)
        try:
            yield
        finally:
            self._ask, self._over = None, True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ask is not None:
            self._ask()
        elif not self._over:
            self._over = True
            sys.exit(number)


def how_to_go_on(directory: RunDirectory) -> str:
    """What an attempt that did not finish leaves, in words; by names only, digests of a large state take minutes."""
    if directory.last is not None:
        return f"continue with --resume from {directory.last.name}"
    if all_in(directory.checkpoints):
        return "continue with --resume"
    return "there is no checkpoint; --resume starts from the beginning"
