"""Which versions a rollout pool keeps and who serves which: with actors that only pretend to fetch."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from learner.spec import PublishedWeights
from orchestration import pools
from orchestration.rollout_pool import RolloutPool
from rollout.transport import Link
from rollout.weights import WeightManifest


class Part:
    """What a reference into the object store stands for: alive as long as somebody holds it."""


class FetchingActor:
    """Notes which versions it was given; `arrived` lets a fetch end."""

    def __init__(self) -> None:
        self.fetched: list[int] = []
        self.arrived = asyncio.Event()
        self.arrived.set()
        self.dies = False
        self.ready = SimpleNamespace(remote=self._answer)
        self.stats = SimpleNamespace(remote=self._answer)
        self.update_weights = SimpleNamespace(remote=self._update)

    async def _answer(self) -> dict[str, int]:
        return {"progress": 0}

    async def _update(self, links: Sequence[Link], parts: Sequence[Part]) -> dict[str, float]:
        self.fetched.append(links[-1].manifest.version)
        await self.arrived.wait()
        if self.dies:
            raise ActorDiedError
        return {"fetch_s": 0.0, "pause_s": 0.0, "num_bytes": 1}


def version(number: int) -> PublishedWeights:
    manifest = WeightManifest(number, (), (0,))
    return PublishedWeights(manifest, (Part(),), (Link(manifest, None),))  # type: ignore[arg-type]


Test = Callable[[RolloutPool, list[FetchingActor]], Coroutine[Any, Any, None]]


@pytest.fixture
def with_pool(monkeypatch: pytest.MonkeyPatch) -> Callable[[Test], None]:
    """Runs a test with a started pool of one, and every actor that it has created."""
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(pools, "RESTART_PAUSE_S", 0.0)

    async def run(test: Test) -> None:
        created: list[FetchingActor] = []

        def create(index: int) -> FetchingActor:
            created.append(FetchingActor())
            if len(created) > 1:
                created[-1].arrived.clear()
            return created[-1]

        options = {"startup_timeout_s": 20, "hang_timeout_s": 20, "restarts": 2, "sync_timeout_s": 20}
        pool = RolloutPool(create, 1, request_timeout_s=20, max_in_flight=8, **options)
        await pool.start()
        try:
            async with asyncio.timeout(20):
                await test(pool, created)
        finally:
            pool.kill()

    return lambda test: asyncio.run(run(test))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def places(pool: RolloutPool) -> set[int]:
    """Indices of the members that take work now."""
    return {member.index for member in pool.members if pool.least_loaded(lambda other, m=member: other is m)}


def test_a_late_joiner_fetches_the_newest_version_and_serves_nothing_before(with_pool: Any) -> None:
    async def test(pool: RolloutPool, actors: list[FetchingActor]) -> None:
        for number in (1, 2, 3):
            await pool.publish(version(number))
            await pool.synchronised()
        pool.resize(2)
        await until(lambda: len(actors) == 2 and bool(actors[1].fetched))
        await pool.publish(version(4))  # while it is still fetching
        await pool.synchronised()
        assert places(pool) == {0}
        actors[1].arrived.set()
        await until(lambda: places(pool) == {0, 1})
        assert actors[1].fetched == [3, 4], "it fetched a version that nobody needs"
        room = pool.reserve(1, lambda served: served == 4)
        assert room is not None and pool.members[1].version == 4

    with_pool(test)


def test_one_that_dies_while_it_joins_never_serves(with_pool: Any) -> None:
    async def test(pool: RolloutPool, actors: list[FetchingActor]) -> None:
        await pool.publish(version(1))
        pool.resize(2)
        await until(lambda: len(actors) == 2 and bool(actors[1].fetched))
        actors[1].dies = True
        actors[1].arrived.set()
        await until(lambda: len(actors) == 3 and bool(actors[2].fetched))
        assert places(pool) == {0}
        actors[2].arrived.set()
        await until(lambda: places(pool) == {0, 1})
        assert pool.members[1].actor is actors[2]

    with_pool(test)


def test_two_versions_are_kept_the_newest_and_the_one_that_is_fetched(with_pool: Any) -> None:
    """Whatever was published in between is let go."""

    async def test(pool: RolloutPool, actors: list[FetchingActor]) -> None:
        kept: weakref.WeakSet[Any] = weakref.WeakSet()

        async def publish(number: int) -> None:
            weights = version(number)
            kept.add(weights.shards[0])
            await pool.publish(weights)

        actors[0].arrived.clear()
        await publish(1)
        await until(lambda: actors[0].fetched == [1])
        first = next(iter(kept))
        for number in (2, 3, 4):
            await publish(number)
        gc.collect()
        assert len(kept) == 2 and first in kept
        del first
        actors[0].arrived.set()
        await pool.synchronised()
        assert actors[0].fetched == [1, 4]
        await asyncio.sleep(0.01)
        gc.collect()
        assert len(kept) == 1

    with_pool(test)
