"""The actor around the engine: concurrent groups, aborts, refused requests, swaps and torn weights; without Ray."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rollout.actor import RolloutActor
from rollout.engine import EngineError, RequestError, SoftEngine
from rollout.engine_thread import RequestAborted
from rollout.nccl_transfer import Broadcast, NcclGroup, TransferError
from rollout.request import RolloutRequest
from rollout.trajectory import Kind, unpack
from rollout.transport import Link, Part
from rollout.weights import WeightError
from tests.rollout.conftest import base_spec, reference_model
from tests.rollout.test_engine_weights import bundle, changed

pytestmark = pytest.mark.slow

DEADLINE_S = 60


def group(name: str, size: int = 4, seed: int = 0) -> list[RolloutRequest]:
    prompt = tuple(5 + len(name) * position % 59 for position in range(12))
    return [RolloutRequest(f"{name}/{index}", name, name, index, seed + index, prompt) for index in range(size)]


def run(test: Callable[[RolloutActor], Awaitable[None]], model: Path, **changes: Any) -> None:
    async def with_actor() -> None:
        async with actor(model, **changes) as started:
            await asyncio.wait_for(test(started), DEADLINE_S)

    asyncio.run(with_actor())


@asynccontextmanager
async def actor(model: Path, **changes: Any) -> AsyncIterator[RolloutActor]:
    started = RolloutActor(base_spec(model, **changes))
    await asyncio.wait_for(started.ready(), DEADLINE_S)
    yield started


def ref(value: Part) -> asyncio.Future[Part]:
    """Stands for an object reference: something to await."""
    future: asyncio.Future[Part] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


def test_groups_while_weights_change(parity_model_dir: Path) -> None:
    model = changed(reference_model(parity_model_dir), seed=2)

    async def test(started: RolloutActor) -> None:
        manifest, shards = bundle(model, 5)
        calls = [asyncio.create_task(started.generate(group(name))) for name in ("a", "bb", "ccc", "dddd")]
        report = await started.update_weights([Link(manifest, None)], [ref(shard) for shard in shards])
        assert report["version"] == 5 and report["num_bytes"] == manifest.num_bytes
        assert report["fetch_s"] >= 0 and report["pause_s"] > 0
        for call, name in zip(calls, ("a", "bb", "ccc", "dddd"), strict=True):
            batch, summary = await call
            assert summary.group_id == name and batch.num_rows == 4
            assert summary.oldest_version in (0, 5) and summary.newest_version in (0, 5)
            trajectories = unpack(batch)
            assert [t.request_id for t in trajectories] == [each.request_id for each in group(name)]
            assert summary.lengths == tuple(len(t.response_ids) for t in trajectories)
            assert summary.soft_lengths == tuple(int((t.kinds == Kind.SOFT).sum()) for t in trajectories)
            assert any(t.response_text for t in trajectories)
        _, after = await started.generate(group("later"))
        assert (after.oldest_version, after.newest_version) == (5, 5)
        stats = await started.stats()
        assert stats["progress"] > 0 and stats["version"] == 5 and stats["generating"] == 0
        assert (await started.engine_stats())["engine/version"] == 5

    run(test, parity_model_dir)


def test_torn_weights_leave_the_old_version(parity_model_dir: Path) -> None:
    model = changed(reference_model(parity_model_dir), seed=2)

    async def test(started: RolloutActor) -> None:
        manifest, shards = bundle(model, 9)
        shards[0] = [data ^ 1 for data in shards[0]]
        with pytest.raises(WeightError, match="version 9, shard 0: checksum"):
            await started.update_weights([Link(manifest, None)], [ref(shard) for shard in shards])
        _, summary = await started.generate(group("a"))
        assert summary.newest_version == 0

    run(test, parity_model_dir)


def test_an_engine_that_sleeps_serves_nothing_until_it_is_woken(parity_model_dir: Path) -> None:
    """What frees the memory is vLLM's on a GPU; that nothing runs meanwhile is ours everywhere."""
    model = changed(reference_model(parity_model_dir), seed=2)

    async def test(started: RolloutActor) -> None:
        running = asyncio.create_task(started.generate(group("a")))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="an engine with 4 requests cannot sleep"):
            await started.sleep()
        before, _ = await running
        await started.sleep()
        await started.sleep()
        await started.wake()
        again, _ = await started.generate(group("a"))
        assert [t.response_text for t in unpack(again)] == [t.response_text for t in unpack(before)]
        await started.sleep()
        manifest, shards = bundle(model, 5)
        await started.update_weights([Link(manifest, None)], [ref(shard) for shard in shards])
        _, summary = await started.generate(group("b"))
        assert summary.oldest_version == 5
        await started.sleep()
        with pytest.raises(RequestError, match="came to an engine that is asleep"):
            await started.generate(group("c"))

    run(test, parity_model_dir)


def test_refusals_and_aborts_end_only_their_group(parity_model_dir: Path) -> None:
    async def test(started: RolloutActor) -> None:
        good = asyncio.create_task(started.generate(group("good")))
        bad = group("bad")
        bad[2] = dataclasses.replace(bad[2], seed=-4)
        with pytest.raises(RequestError, match=r"bad/2: seed=-4"):
            await started.generate(bad)
        aborted = asyncio.create_task(started.generate(group("aborted", size=12, seed=100)))
        await asyncio.sleep(0)
        lengths = await started.abort([each.request_id for each in group("aborted", size=12)])
        assert lengths and all(0 <= length <= 64 for length in lengths)
        with pytest.raises(RequestAborted, match="aborted/"):
            await aborted
        batch, _ = await good
        assert batch.num_rows == 4
        assert (await started.engine_stats())["unfinished"] == 0
        again, _ = await started.generate(group("aborted", size=12, seed=100))
        assert again.num_rows == 12

    run(test, parity_model_dir)


def test_a_cancelled_call_stops_its_requests_and_nothing_else(parity_model_dir: Path) -> None:
    async def test(started: RolloutActor) -> None:
        cancelled = asyncio.create_task(started.generate(group("cancelled", size=8)))
        other = asyncio.create_task(started.generate(group("other")))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        batch, _ = await other
        assert batch.num_rows == 4
        assert cancelled.cancelled() or cancelled.done()
        assert (await started.engine_stats())["unfinished"] == 0

    run(test, parity_model_dir)


def test_a_failing_engine_tells_everybody(parity_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(started: RolloutActor) -> None:
        def broken(self: SoftEngine) -> None:
            raise RuntimeError("device lost")

        monkeypatch.setattr(SoftEngine, "step", broken)
        with pytest.raises(EngineError, match="the engine has failed: device lost"):
            await started.generate(group("a"))
        with pytest.raises(EngineError, match="the engine has failed: device lost"):
            await started.generate(group("b"))
        with pytest.raises(EngineError, match="device lost"):
            await started.stats()

    run(test, parity_model_dir)


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    async def test() -> None:
        started = RolloutActor(base_spec(tmp_path / "nowhere"))
        with pytest.raises(Exception, match="nowhere"):
            await asyncio.wait_for(started.ready(), DEADLINE_S)

    asyncio.run(test())


def test_an_engine_that_is_torn_by_a_transfer_steps_no_more(parity_model_dir: Path) -> None:
    async def test(started: RolloutActor) -> None:
        running = asyncio.create_task(started.generate(group("a")))
        manifest, _ = bundle(reference_model(parity_model_dir), 1)
        with pytest.raises(TransferError, match="not started with transport: nccl"):
            await started.receive_weights(Broadcast(manifest, 0, NcclGroup("", 0, 1, 1, 5.0), 0))
        with pytest.raises(EngineError, match="the engine has failed"):
            await running
        with pytest.raises(EngineError, match="the engine has failed"):
            await started.stats()

    run(test, parity_model_dir)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), WeightError("tensor x: 3 bytes are no float32")])
def test_an_engine_that_is_torn_by_a_swap_steps_no_more(
    error: Exception, parity_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes were right; what failed is loading them, with some tensors of either version in place."""

    def half(self: SoftEngine, manifest: object, shards: object) -> None:
        raise error

    async def test(started: RolloutActor) -> None:
        running = asyncio.create_task(started.generate(group("a")))
        manifest, shards = bundle(reference_model(parity_model_dir), 1)
        with pytest.raises(EngineError, match=f"version 1 was loaded in part: {type(error).__name__}: {error}"):
            await started.update_weights([Link(manifest, None)], [ref(shard) for shard in shards])
        with pytest.raises(EngineError, match="the engine has failed"):
            await running
        with pytest.raises(EngineError, match="the engine has failed"):
            await started.stats()

    monkeypatch.setattr(SoftEngine, "load_weights", half)
    run(test, parity_model_dir)
