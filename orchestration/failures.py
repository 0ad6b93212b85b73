"""What can go wrong in a run, as the controller sees it: each class says who is told and what happens next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from orchestration.watchdog import waiting_for

T = TypeVar("T")


class RunError(RuntimeError):
    """The run cannot go on: exit code 1, after a checkpoint where the learner still answers."""


class DeadlineExceeded(RunError):
    """A wait ended without what it waited for; the message names it and how long it lasted."""


class PoolExhausted(RunError):
    """A pool spent its restart budget."""


class RunDirectoryBusy(RunError):
    """Another driver holds the lease of this run directory."""


class ActorLost(Exception):
    """An actor died, hung or answered with a broken engine: it is replaced and its requests are dispatched again."""


class InputLost(Exception):
    """An object that a call needed is gone with its node, or has the wrong bytes; the actor that missed it is well."""


class GroupFailed(Exception):
    """A group that no actor can generate or grade (bad input, not bad luck): it is failed with this reason."""


async def within(awaitable: Awaitable[T], seconds: float, what: str) -> T:
    """Await with a deadline. Raises `DeadlineExceeded` that says what was waited for and how long.

    Half of the deadline gone is worth a report with stacks; at the end they are lost.
    """
    try:
        with waiting_for(what, who="driver", deadline_s=seconds / 2):
            async with asyncio.timeout(seconds):  # not wait_for, which in Python 3.11 may swallow a cancellation
                return await awaitable
    except TimeoutError:
        raise DeadlineExceeded(f"waited {seconds:.0f} s for {what}") from None


def one_line(error: BaseException) -> str:
    """What an error was, for a log: of an error that an actor raised the cause, without Ray's stacks."""
    cause = getattr(error, "cause", None)
    told = cause if isinstance(cause, BaseException) else error
    return f"{type(told).__name__}: {(str(told).strip().splitlines() or [''])[0]}"
