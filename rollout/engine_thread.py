"""The thread that owns a `SoftEngine`: it steps the engine, and runs commands between two steps.

Everybody else holds futures: of a request, resolved when it has finished or was cut, or of a command. When the engine
fails, every one of them is told. The thread ends with its process: pools kill actors, they do not stop them.
"""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.engine import EngineError, EngineSpec, SoftEngine
from rollout.lean_imports import lean_imports
from rollout.request import RolloutRequest
from rollout.trajectory import Trajectory

_logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.5
"""How long the engine thread sleeps at most when it has nothing to do; a command wakes it at once."""


class RequestAborted(RuntimeError):
    """The request was aborted before it finished."""


@dataclass(frozen=True)
class Command:
    """Something for the engine thread to do between two steps, and who waits for it."""

    run: Callable[[SoftEngine], None]
    futures: tuple[concurrent.futures.Future[Any], ...] = ()

    def fail(self, error: BaseException) -> None:
        """Tell everybody who waits that it will not happen."""
        _fail_futures(self.futures, error)


def _fail_futures(futures: Iterable[concurrent.futures.Future[Any]], error: BaseException) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(EngineError(f"the engine has failed: {error}"))


def pending_future() -> concurrent.futures.Future[Any]:
    """A future that its awaiting task cannot cancel: the engine thread will resolve it in any case."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    return future


class EngineThread:
    """Runs an engine; every method but `_run` may be called from any thread."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._waiting: dict[str, concurrent.futures.Future[Trajectory]] = {}
        """Futures of running requests; touched by the engine thread only."""
        self.failure: BaseException | None = None
        self.progress = 0
        """Engine steps and commands so far: a watchdog sees whether this thread moves."""
        self.started: concurrent.futures.Future[SoftEngine] = pending_future()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def call(self, command: Callable[[SoftEngine], Any], *, vital: bool = False) -> concurrent.futures.Future[Any]:
        """Run `command(engine)` between two steps; if a `vital` one fails, the engine steps no more."""
        future = pending_future()

        def run(engine: SoftEngine) -> None:
            try:
                future.set_result(command(engine))
            except Exception as error:  # handed to the caller, who decides
                future.set_exception(error)
                if vital:
                    raise

        self._enqueue(Command(run, (future,)))
        return future

    def generate(
        self, requests: Sequence[RolloutRequest], prefixes: Mapping[str, Trajectory]
    ) -> list[concurrent.futures.Future[Trajectory]]:
        """One future per request; those in `prefixes` (by id) go on there. A request that is refused fails alone."""
        futures: list[concurrent.futures.Future[Trajectory]] = [pending_future() for _ in requests]

        def run(engine: SoftEngine) -> None:
            for request, future in zip(requests, futures, strict=True):
                try:
                    engine.add(request, prefix=prefixes.get(request.request_id))
                except ValueError as error:
                    future.set_exception(error)
                else:
                    self._waiting[request.request_id] = future

        self._enqueue(Command(run, tuple(futures)))
        return futures

    def abort(self, request_ids: Sequence[str]) -> concurrent.futures.Future[list[Trajectory]]:
        """Stop requests; their futures fail with `RequestAborted`."""

        def run(engine: SoftEngine) -> list[Trajectory]:
            return self._fail_aborted(engine, request_ids)

        return self.call(run)

    def withdraw(self, futures: Collection[concurrent.futures.Future[Trajectory]]) -> None:
        """Abort the requests that these futures wait for, and no other that happens to have the same id."""
        owned = set(futures)

        def run(engine: SoftEngine) -> None:
            self._fail_aborted(engine, [name for name, future in self._waiting.items() if future in owned])

        self.call(run)

    def _fail_aborted(self, engine: SoftEngine, request_ids: Sequence[str]) -> list[Trajectory]:
        partial = engine.abort(request_ids)
        for trajectory in partial:
            future = self._waiting.pop(trajectory.request_id)
            future.set_exception(RequestAborted(f"request {trajectory.request_id} was aborted"))
        return partial

    def cut(self, request_ids: Collection[str] | None) -> concurrent.futures.Future[int]:
        """Stop requests (None: all); their futures get what they have so far. The number that was running."""

        def run(engine: SoftEngine) -> int:
            partial = engine.abort(list(self._waiting if request_ids is None else request_ids))
            for trajectory in partial:
                self._waiting.pop(trajectory.request_id).set_result(trajectory)
            return len(partial)

        return self.call(run)

    def _enqueue(self, command: Command) -> None:
        self._commands.put(command)
        if self.failure is not None:  # the queue has no reader any more
            self._fail_commands(self.failure)

    def _fail_commands(self, error: BaseException) -> None:
        while True:
            try:
                self._commands.get_nowait().fail(error)
            except queue.Empty:
                return

    def _run(self) -> None:
        try:
            with lean_imports():
                engine = SoftEngine(self._spec)
            self.started.set_result(engine)
            while True:
                self._run_commands(engine)
                if engine.num_unfinished:
                    for trajectory in engine.step():
                        future = self._waiting.pop(trajectory.request_id, None)
                        if future is not None:
                            future.set_result(trajectory)
                    self.progress += 1
        except BaseException as error:
            # The boundary of the thread: nothing after this line would run, so everybody who waits must be told.
            _logger.exception("the engine thread ends")
            self._fail(error)

    def _run_commands(self, engine: SoftEngine) -> None:
        block = not engine.num_unfinished
        while True:
            try:
                command = self._commands.get(block=block, timeout=_IDLE_WAIT_S)
            except queue.Empty:
                return
            try:
                command.run(engine)
            except BaseException as error:  # it ends the thread, and this command is in no queue any more
                command.fail(error)
                raise
            self.progress += 1
            block = False

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        if not self.started.done():
            self.started.set_exception(error)
        _fail_futures(self._waiting.values(), error)
        self._waiting.clear()
        self._fail_commands(error)
