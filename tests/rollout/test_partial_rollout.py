"""A group that is cut at a step boundary goes on, on another actor, as if it had never been interrupted."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rollout.actor import RolloutActor
from rollout.engine import RequestError, SoftEngine
from rollout.request import GroupSummary, RequestSettings, RolloutRequest
from rollout.trajectory import Kind, Trajectory, unpack
from rollout.transport import Link
from tests.rollout.conftest import base_spec, reference_model
from tests.rollout.test_actor import DEADLINE_S, ref
from tests.rollout.test_engine import assert_same
from tests.rollout.test_engine_weights import bundle

pytestmark = pytest.mark.slow

SETTINGS = RequestSettings(thinking_budget=10, max_new_tokens=28, answer_top_p=0.95)
NEVER = 10**9


@pytest.fixture(scope="module")
def actors(parity_model_dir: Path) -> Iterator[tuple[RolloutActor, RolloutActor]]:
    """Two engines; the second batches otherwise, so nothing but the recorded rows can make them agree."""
    yield started(parity_model_dir), started(parity_model_dir, block_size=64)


def started(model: Path, **changes: Any) -> RolloutActor:
    """One engine after the other: they share this process's distributed state."""
    actor = RolloutActor(base_spec(model, **changes))
    actor._engine.started.result(DEADLINE_S)
    return actor


def group(name: str, *, size: int = 4, thinking: str = "soft", prompt_len: int = 12) -> list[RolloutRequest]:
    prompt = tuple(5 + (len(name) + 7 * position) % 59 for position in range(prompt_len))
    return [
        RolloutRequest(f"{name}/{index}", name, name, index, 40 + index, prompt, thinking, SETTINGS)  # type: ignore[arg-type]
        for index in range(size)
    ]


async def generate(
    actor: RolloutActor, requests: list[RolloutRequest], so_far: pa.RecordBatch | None = None, *, cut_at: int = NEVER
) -> tuple[pa.RecordBatch, GroupSummary]:
    """One call; everything that runs is cut after `cut_at` engine steps of it."""
    engine: SoftEngine = await asyncio.wrap_future(actor._engine.started)
    steps = 0

    def step() -> list[Trajectory]:
        nonlocal steps
        steps += 1
        finished = SoftEngine.step(engine)
        if steps == cut_at:
            actor._engine.cut(None)
        return finished

    engine.step = step  # type: ignore[method-assign]
    try:
        return await asyncio.wait_for(actor.generate(requests, so_far), DEADLINE_S)
    finally:
        del engine.step


def assert_uninterrupted(found: pa.RecordBatch, whole: pa.RecordBatch) -> None:
    for left, right in zip(unpack(found), unpack(whole), strict=True):
        assert_same(left, right, exact=False)
        np.testing.assert_array_equal(left.noise, right.noise, err_msg="noise is a function of seed and position")
        assert left.finish_reason == right.finish_reason
        assert (left.response_text, left.answer_text) == (right.response_text, right.answer_text)


@pytest.mark.parametrize("thinking", ["soft", "discrete"])
@pytest.mark.parametrize("cuts", [(5,), (17,), (3, 9), (8, 1, 1)], ids=str)
def test_a_cut_group_goes_on_elsewhere(
    cuts: tuple[int, ...], thinking: str, actors: tuple[RolloutActor, RolloutActor]
) -> None:
    """Cut while it thinks, in its answer, twice, three times."""

    async def test() -> None:
        requests = group("on", thinking=thinking)
        whole, _ = await generate(actors[0], requests)
        drawn_before = num_drawn(actors)
        batch: pa.RecordBatch | None = None
        for number, steps in enumerate(cuts):
            batch, summary = await generate(actors[number % 2], requests, batch, cut_at=steps)
            cut = [t for t in unpack(batch) if t.finish_reason == "cut"]
            assert summary.num_cut == len(cut) > 0
            assert [t.request_id for t in unpack(batch)] == [each.request_id for each in requests]
            assert all(t.response_text == "" for t in cut)
        batch, summary = await generate(actors[len(cuts) % 2], requests, batch)
        assert summary.num_cut == 0
        assert_uninterrupted(batch, whole)
        assert num_drawn(actors) - drawn_before == sum(summary.lengths), "no position was drawn twice"

    asyncio.run(test())


def num_drawn(actors: tuple[RolloutActor, ...]) -> int:
    """Tokens that the engines have drawn since they started."""
    return sum(actor._engine.started.result().num_tokens for actor in actors)


def test_the_cuts_above_reach_both_phases(actors: tuple[RolloutActor, RolloutActor]) -> None:
    """What the test above relies on: after 5 steps rows think; after 17 some answer and some have finished."""

    async def test() -> None:
        early, _ = await generate(actors[0], group("on"), cut_at=5)
        assert any(t.finish_reason == "cut" and set(t.kinds) == {Kind.SOFT} for t in unpack(early))
        late, _ = await generate(actors[0], group("on"), cut_at=17)
        assert any(t.finish_reason == "cut" and t.kinds[-1] == Kind.DISCRETE for t in unpack(late))
        assert any(t.finish_reason != "cut" for t in unpack(late)), "a finished row is carried over"

    asyncio.run(test())


@pytest.mark.parametrize("thinking", ["soft", "discrete"])
def test_cut_before_the_first_token(thinking: str, actors: tuple[RolloutActor, RolloutActor]) -> None:
    """In the middle of a chunked prefill, and in the queue: 20 requests for 16 seats."""

    async def test() -> None:
        requests = group(f"waiting {thinking}", size=20, thinking=thinking, prompt_len=90)
        whole, _ = await generate(actors[0], requests)
        batch, summary = await generate(actors[1], requests, cut_at=1)
        assert summary.num_cut == 20 and set(summary.lengths) == {0}
        assert (summary.oldest_version, summary.newest_version) == (0, 0)
        batch, summary = await generate(actors[0], requests, batch, cut_at=24)
        assert 0 < summary.num_cut < 20 or min(summary.lengths) == 0
        batch, _ = await generate(actors[1], requests, batch)
        assert_uninterrupted(batch, whole)

    asyncio.run(test())


def test_old_positions_keep_their_version(actors: tuple[RolloutActor, RolloutActor], parity_model_dir: Path) -> None:
    """The same weights under another number: the same trajectory, each position under the version that drew it."""

    async def test() -> None:
        requests = group("versions")
        whole, _ = await generate(actors[0], requests)
        batch, _ = await generate(actors[0], requests, cut_at=6)
        lengths = [len(t.response_ids) for t in unpack(batch)]
        other = started(parity_model_dir)
        manifest, shards = bundle(reference_model(parity_model_dir), 7)
        await other.update_weights([Link(manifest, None)], [ref(shard) for shard in shards])
        continued, summary = await generate(other, requests, batch)
        assert (summary.oldest_version, summary.newest_version) == (0, 7)
        for trajectory, expected, length in zip(unpack(continued), unpack(whole), lengths, strict=True):
            assert_same(dataclasses.replace(trajectory, versions=expected.versions), expected, exact=False)
            assert (trajectory.versions[:length] == 0).all() and (trajectory.versions[length:] == 7).all()

    asyncio.run(test())


def test_only_the_named_requests_are_cut(actors: tuple[RolloutActor, RolloutActor]) -> None:
    async def test() -> None:
        named, other = group("named"), group("other")
        calls = [asyncio.create_task(actors[0].generate(requests)) for requests in (named, other)]
        await asyncio.sleep(0)
        assert await actors[0].cut([*(each.request_id for each in named), "unknown"]) == 4
        (_, cut), (_, whole) = await asyncio.wait_for(asyncio.gather(*calls), DEADLINE_S)
        assert (cut.num_cut, whole.num_cut) == (4, 0)
        assert await actors[0].cut() == 0
        assert (await actors[0].engine_stats())["unfinished"] == 0

    asyncio.run(test())


def test_a_batch_of_other_requests_is_refused(actors: tuple[RolloutActor, RolloutActor]) -> None:
    async def test() -> None:
        batch, _ = await generate(actors[0], group("mine"), cut_at=4)
        with pytest.raises(RequestError, match=r"has other requests: .*mine/0"):
            await actors[0].generate(group("yours"), batch)
        changed = [dataclasses.replace(each, seed=each.seed + 1) for each in group("mine")]
        with pytest.raises(RequestError, match="another prompt or seed"):
            await actors[0].generate(changed, batch)
        stats: dict[str, Any] = await actors[0].engine_stats()
        assert stats["unfinished"] == 0

    asyncio.run(test())


def test_a_second_call_with_running_ids_leaves_the_first_alone(actors: tuple[RolloutActor, RolloutActor]) -> None:
    async def test() -> None:
        first = asyncio.create_task(actors[0].generate(group("twice")))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match=r"twice/[0-3] is already running"):
            await actors[0].generate([*group("twice"), *group("fresh", size=1)])
        batch, summary = await asyncio.wait_for(first, DEADLINE_S)
        assert batch.num_rows == 4 and summary.num_cut == 0
        assert (await actors[0].engine_stats())["unfinished"] == 0, "the new request of the refused call is stopped"

    asyncio.run(test())
