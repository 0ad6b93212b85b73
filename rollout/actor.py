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
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rollout.engine import EngineError, EngineSpec, RequestError, SoftEngine
from rollout.engine_thread import EngineThread
from rollout.nccl_transfer import Broadcast
from rollout.payload import candidate_entropy
from rollout.request import GroupSummary, RolloutRequest
from rollout.trajectory import Kind, Trajectory, pack, unpack
from rollout.transport import Link, Part, make_receiver
from rollout.weights import VERSION_VARIABLE, Shard, WeightManifest

if TYPE_CHECKING:
    from ray import ObjectRef


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
            parts = future.result()  # the deadline is the pool's, `pipeline.sync_timeout_s`, at which this actor dies
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
