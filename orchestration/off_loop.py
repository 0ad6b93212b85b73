"""Slow work with files beside the event loop, which meanwhile pings, dispatches and hears signals.

What has begun is carried through: a task that is cancelled meanwhile is so when the thread has ended. A graceful stop
must not fall between two renames, and no thread may write on when the run is thought to be over.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(call: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a thread; a cancellation takes effect after it."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from work.exception()
    return work.result()


@asynccontextmanager
async def left_in_thread(context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """A context that is quick to enter and slow to leave."""
    value = context.__enter__()
    try:
        yield value
    except BaseException as error:
        if not await in_thread(context.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        await in_thread(context.__exit__, None, None, None)
