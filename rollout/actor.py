"""The rollout actor: many concurrent `generate` calls, one engine thread, weight swaps between two steps.

    event loop (async methods)                         engine thread (owns SoftEngine, steps it)
    generate: submit requests, await their futures --> commands are run between two steps
    cut: end running calls with what they have     --> abort, futures get the rows so far; any actor continues them
    update_weights: fetch + verify shards, then    --> load_weights, then go on stepping
    pack, decode: worker threads                   <-- finished trajectories resolve futures

Importable without torch and vLLM; the pool wraps the class with `ray.remote` and sets `engine_environment(spec)`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rollout.engine import EngineError, EngineSpec, RequestError, SoftEngine
from rollout.lean_imports import lean_imports
from rollout.nccl_transfer import Broadcast
from rollout.payload import candidate_entropy
from rollout.request import GroupSummary, RolloutRequest
from rollout.trajectory import Kind, Trajectory, pack, unpack
from rollout.transport import Link, Part, make_receiver
from rollout.weights import VERSION_VARIABLE, Shard, WeightManifest

if TYPE_CHECKING:
    from ray import ObjectRef

_logger = logging.getLogger(__name__)

_FETCH_DEADLINE_S = 600.0
"""For the parts of one weight version to arrive on this node; the pool's own deadline is `pipeline.sync_timeout_s`."""
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
        for future in self.futures:
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
        self._stopping = False
        self.progress = 0
        """Engine steps and commands so far: a watchdog sees whether this thread moves."""
        self.started: concurrent.futures.Future[SoftEngine] = pending_future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

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

    def stop(self, timeout_s: float) -> bool:
        """End the thread after its current step; False if that took too long."""
        self._stopping = True
        self._commands.put(Command(lambda engine: None))
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

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
            while not self._stopping:
                self._run_commands(engine)
                if engine.num_unfinished:
                    for trajectory in engine.step():
                        future = self._waiting.pop(trajectory.request_id, None)
                        if future is not None:
                            future.set_result(trajectory)
                    self.progress += 1
            engine.shutdown()
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
            command.run(engine)
            self.progress += 1
            block = False

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        if not self.started.done():
            self.started.set_exception(error)
        for future in self._waiting.values():
            future.set_exception(EngineError(f"the engine has failed: {error}"))
        self._waiting.clear()
        self._fail_commands(error)


class RolloutActor:
    """An async Ray actor around one engine."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._engine = EngineThread(spec)
        self._update = asyncio.Lock()
        self._receiver = make_receiver(spec.transport)
        self._version = spec.initial_version
        self._max_candidates = spec.soft.get("max_candidates", 5)
        self._generating = 0

    async def ready(self) -> dict[str, Any]:
        """Wait until the engine serves; what it is."""
        started = time.monotonic()
        engine = await asyncio.wrap_future(self._engine.started)
        return {
            "version": self._version,
            "model": self._spec.model_path,
            "stop_ids": engine.stop_ids,
            "waited_s": time.monotonic() - started,
        }

    async def generate(
        self, requests: list[RolloutRequest], so_far: pa.RecordBatch | None = None
    ) -> tuple[pa.RecordBatch, GroupSummary]:
        """Generate one group; resolves when all its requests have finished or were cut (`num_cut` of the summary).

        `so_far` is the batch of a call that was cut, on this or another actor: its finished rows are taken over, the
        others go on from their recorded positions as if never interrupted.

        Raises `RequestError` if one of them is refused, `RequestAborted` if one is aborted; the others are stopped.
        """
        started = time.monotonic()
        found = _rows_by_id(requests, so_far)
        open_requests = [each for each in requests if not _is_finished(found.get(each.request_id))]
        # Submitted before the first await: an abort that arrives later finds them.
        submitted = self._engine.generate(open_requests, found)
        futures = [asyncio.wrap_future(future) for future in submitted]
        self._generating += len(open_requests)
        try:
            found |= {trajectory.request_id: trajectory for trajectory in await asyncio.gather(*futures)}
        except BaseException:
            self._engine.withdraw(submitted)
            await asyncio.gather(*futures, return_exceptions=True)
            raise
        finally:
            self._generating -= len(open_requests)
        engine = await asyncio.wrap_future(self._engine.started)
        trajectories = [found[request.request_id] for request in requests]
        batch, trajectories = await asyncio.to_thread(self._finish, engine, trajectories)
        return batch, summarise(trajectories, time.monotonic() - started, self._version)

    def _finish(
        self, engine: SoftEngine, trajectories: Sequence[Trajectory]
    ) -> tuple[pa.RecordBatch, list[Trajectory]]:
        with_text = []
        for trajectory in trajectories:
            response, answer = engine.decode(trajectory) if _is_finished(trajectory) else ("", "")
            with_text.append(replace(trajectory, response_text=response, answer_text=answer))
        return pack(with_text, self._max_candidates), with_text

    async def update_weights(self, links: Sequence[Link], part_refs: list[ObjectRef]) -> dict[str, float]:
        """Serve the last link's policy version; decoding goes on until all its bytes are here and checked.

        `part_refs` are the parts of all links in order (see `rollout.transport`). Raises `WeightError` if they are
        torn; the old version then stays in service. After an `EngineError` it does not: the new one was loaded in part.
        The report has the seconds of the fetch and of the pause in which nothing was decoded, and the bytes fetched.
        """
        loop, manifest, num_bytes = asyncio.get_running_loop(), links[-1].manifest, 0

        def fetch(first: int, count: int) -> list[Part]:
            nonlocal num_bytes
            future = asyncio.run_coroutine_threadsafe(_gather(part_refs[first : first + count]), loop)
            parts = future.result(_FETCH_DEADLINE_S)
            num_bytes += sum(data.nbytes for part in parts for data in part)
            return parts

        async with self._update:
            started = time.monotonic()
            shards = await asyncio.to_thread(self._receiver.receive, links, fetch)
            fetched = time.monotonic()
            await asyncio.wrap_future(self._engine.started)
            swap = self._engine.call(lambda engine: _swap(engine, manifest, shards), vital=True)
            pause_s = await asyncio.wrap_future(swap)
            self._serve(manifest.version)
        return {
            "version": manifest.version,
            "fetch_s": fetched - started,
            "pause_s": pause_s,
            "num_bytes": num_bytes,
        }

    async def receive_weights(self, broadcast: Broadcast) -> dict[str, float]:
        """Serve the version that the learner broadcasts now; nothing is decoded meanwhile.

        The report is that of `update_weights`. After an exception the engine has failed: it holds a torn version.
        """
        manifest = broadcast.manifest
        async with self._update:
            started = time.monotonic()
            await asyncio.wrap_future(self._engine.call(lambda engine: engine.receive_weights(broadcast), vital=True))
            self._serve(manifest.version)
        return {
            "version": manifest.version,
            "fetch_s": 0.0,
            "pause_s": time.monotonic() - started,
            "num_bytes": manifest.num_bytes,
        }

    def _serve(self, version: int) -> None:
        self._version = version
        os.environ[VERSION_VARIABLE] = str(version)

    async def abort(self, request_ids: Sequence[str]) -> list[int]:
        """Stop requests, whose `generate` calls fail; returns the lengths in tokens of those that were running."""
        aborted = await asyncio.wrap_future(self._engine.abort(request_ids))
        return [len(trajectory.response_ids) for trajectory in aborted]

    async def cut(self, request_ids: Sequence[str] | None = None) -> int:
        """End running `generate` calls at the next step boundary with what they have; returns how many were running.

        None cuts every request. The calls resolve with rows whose finish reason is `cut`.
        """
        return await asyncio.wrap_future(self._engine.cut(request_ids))

    async def sleep(self) -> None:
        """Give the device's memory up until `wake` or the next weights; fails while requests run."""
        await asyncio.wrap_future(self._engine.call(SoftEngine.sleep))

    async def wake(self) -> None:
        """Serve again with the weights of before."""
        await asyncio.wrap_future(self._engine.call(SoftEngine.wake))

    async def stats(self) -> dict[str, float]:
        """Liveness and counters; answers also while the engine is busy or hangs, fails once it has failed."""
        if self._engine.failure is not None:
            raise EngineError(f"the engine has failed: {self._engine.failure}")
        return {"progress": self._engine.progress, "generating": self._generating, "version": self._version}

    async def engine_stats(self) -> dict[str, float]:
        """Counters of the engine itself, taken between two steps."""
        return await asyncio.wrap_future(self._engine.call(SoftEngine.stats))

    async def shutdown(self, timeout_s: float = 10.0) -> bool:
        """Stop the engine thread."""
        return await asyncio.to_thread(self._engine.stop, timeout_s)


async def _gather(refs: Sequence[Any]) -> list[Part]:
    return list(await asyncio.gather(*refs))


def _swap(engine: SoftEngine, manifest: WeightManifest, shards: Sequence[Shard]) -> float:
    """Load verified shards; the seconds it took. Raises `EngineError`: the engine may hold a part of the version."""
    started = time.monotonic()
    try:
        engine.load_weights(manifest, shards)
    except Exception as error:  # whatever vLLM raises; a `WeightError` would say that the old version still serves
        raise EngineError(f"version {manifest.version} was loaded in part: {type(error).__name__}: {error}") from error
    return time.monotonic() - started


def _rows_by_id(requests: Sequence[RolloutRequest], so_far: pa.RecordBatch | None) -> dict[str, Trajectory]:
    """The rows of a cut batch. Raises `RequestError` unless they are those of the requests."""
    if so_far is None:
        return {}
    found = {trajectory.request_id: trajectory for trajectory in unpack(so_far)}
    if found.keys() != {request.request_id for request in requests}:
        raise RequestError(f"group {requests[0].group_id}: the batch to go on from has other requests: {list(found)}")
    return found


def _is_finished(trajectory: Trajectory | None) -> bool:
    return trajectory is not None and trajectory.finish_reason != "cut"


def summarise(trajectories: Sequence[Trajectory], seconds: float, version: int) -> GroupSummary:
    """What the controller needs to know of a group; `version` is served now, for a group without any token yet."""
    entropies, heaviest = [], []
    for trajectory in trajectories:
        entropies.append(candidate_entropy(trajectory.candidate_logprobs))
        heaviest.append(trajectory.weights.max(axis=1, initial=0.0))
    entropy, top = np.concatenate(entropies), np.concatenate(heaviest)
    versions = [(int(t.versions.min()), int(t.versions.max())) for t in trajectories if len(t.versions)]
    return GroupSummary(
        group_id=trajectories[0].group_id,
        request_ids=tuple(trajectory.request_id for trajectory in trajectories),
        lengths=tuple(len(trajectory.response_ids) for trajectory in trajectories),
        soft_lengths=tuple(int((trajectory.kinds == Kind.SOFT).sum()) for trajectory in trajectories),
        oldest_version=min((low for low, _ in versions), default=version),
        newest_version=max((high for _, high in versions), default=version),
        num_truncated=sum(trajectory.finish_reason == "length" for trajectory in trajectories),
        entropy=float(entropy.mean()) if entropy.size else 0.0,
        top_weight=float(top.mean()) if top.size else 0.0,
        seconds=seconds,
        num_cut=sum(trajectory.finish_reason == "cut" for trajectory in trajectories),
    )
