"""A pool whose versions are broadcast: who is in the group, who fetches instead, and what a failed transfer costs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from learner.spec import LearnerError, PublishedWeights
from orchestration import pools
from orchestration.broadcast import BroadcastPool
from orchestration.failures import PoolExhausted
from rollout.nccl_transfer import Broadcast, NcclGroup, TransferError
from rollout.transport import Link
from rollout.weights import WeightError, WeightManifest
from tests.orchestration.test_pools import task_error


def weights(version: int) -> PublishedWeights:
    manifest = WeightManifest(version, (), ())
    return PublishedWeights(manifest, (), (Link(manifest, None, 77),))


class FakeActor:
    """Remembers how each version reached it."""

    def __init__(self, index: int, gone: Callable[[], set[int]]) -> None:
        self.index = index
        self.gone = gone
        """Indices of those that cannot fetch."""
        self.received: list[Broadcast] = []
        self.fetched: list[int] = []
        self.fail: Exception | None = None
        for name in ("ready", "stats", "update_weights", "receive_weights"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    async def _ready(self) -> dict[str, int]:
        return {}

    _stats = _ready

    async def _update_weights(self, links: list[Link], parts: list[Any]) -> dict[str, float]:
        self.fetched.append(links[-1].manifest.version)
        if self.index in self.gone():
            raise task_error(WeightError("checksum 1, need 2"))
        return {"version": links[-1].manifest.version, "fetch_s": 0.1, "pause_s": 0.1, "num_bytes": 5}

    async def _receive_weights(self, broadcast: Broadcast) -> dict[str, float]:
        if self.fail is not None:
            raise self.fail
        self.received.append(broadcast)
        return {"version": broadcast.manifest.version, "fetch_s": 0.0, "pause_s": 0.1, "num_bytes": 5}


class FakeLearner:
    """The learner group's end."""

    def __init__(self) -> None:
        self.generation = 1
        self.ports = iter(range(29_500, 30_000))
        self.groups: list[NcclGroup] = []
        self.error: Exception | None = None

    async def endpoint(self) -> tuple[str, int]:
        return "10.0.0.1", next(self.ports)

    async def broadcast(self, manifest: WeightManifest, group: NcclGroup) -> None:
        self.groups.append(group)
        if self.error is not None:
            raise self.error


class Bench:
    """Two actors and a learner."""

    def __init__(self) -> None:
        self.learner = FakeLearner()
        self.gone: set[int] = set()
        self.actors: list[FakeActor] = []
        learner: Any = self.learner
        self.pool = BroadcastPool(
            learner,
            2,
            self._create,
            2,
            request_timeout_s=5,
            sync_timeout_s=5,
            max_in_flight=4,
            startup_timeout_s=5,
            hang_timeout_s=5,
            restarts=2,
        )

    def _create(self, index: int) -> FakeActor:
        self.actors.append(FakeActor(index, lambda: self.gone))
        return self.actors[-1]

    async def all_serve(self, version: int) -> None:
        async with asyncio.timeout(5):
            while not all(member.ready and member.version == version for member in self.pool.members):
                await asyncio.sleep(0.01)


def run(test: Callable[[Bench], Awaitable[None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools.ray, "kill", lambda actor: None)
    monkeypatch.setattr(pools, "RESTART_PAUSE_S", 0.0)

    async def with_bench() -> None:
        bench = Bench()
        await bench.pool.start()
        await test(bench)
        bench.pool.kill()

    asyncio.run(with_bench())


def test_members_keep_one_group_and_fetch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        for version in (1, 2):
            await bench.pool.publish(weights(version))
            assert [member.version for member in bench.pool.members] == [version, version], "when it returns, not later"
        assert len(set(bench.learner.groups)) == 1
        assert bench.learner.groups[0].world_size == 5
        for index, actor in enumerate(bench.actors):
            assert actor.fetched == []
            assert [(each.engine, each.digest, each.group) for each in actor.received] == [
                (index, 77, bench.learner.groups[0])
            ] * 2
        assert len(bench.pool.take_sync_reports()) == 4

    run(test, monkeypatch)


def test_a_failed_transfer_costs_its_actor_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        await bench.pool.publish(weights(1))
        bench.actors[0].fail = task_error(TransferError("digest 1, need 2"))
        await bench.pool.publish(weights(2))
        assert bench.actors[1].received[-1].manifest.version == 2
        await bench.all_serve(2)
        assert bench.pool.counts == {"lost/transfer": 1, "restarts": 1}
        assert bench.actors[2].fetched == [2], "the replacement joins no group before it serves"
        await bench.pool.publish(weights(3))
        assert bench.learner.groups[2] != bench.learner.groups[1], "others serve: another group"
        assert [actor.received[-1].manifest.version for actor in bench.actors[1:]] == [3, 3]

    run(test, monkeypatch)


def test_whoever_is_not_ready_gets_the_version_from_the_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        bench.pool.resize(3)
        await bench.pool.publish(weights(1))
        await bench.all_serve(1)
        assert [actor.fetched for actor in bench.actors] == [[], [], [1]]
        assert bench.learner.groups[0].num_engines == 2

    run(test, monkeypatch)


def test_a_learner_that_only_could_not_send_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        bench.learner.error = TransferError("aborted")
        for actor in bench.actors:
            actor.fail = task_error(TransferError("aborted"))
        await bench.pool.publish(weights(1))
        await bench.all_serve(1)
        assert [actor.fetched for actor in bench.actors] == [[], [], [1], [1]]

    run(test, monkeypatch)


@pytest.mark.parametrize("death", [ActorDiedError(), None])
def test_those_that_one_death_takes_along_are_not_charged(
    death: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broadcast that fails costs one restart of the two in the budget, however many engines there are."""

    async def test(bench: Bench) -> None:
        bench.pool.resize(12)
        await bench.all_serve(0)
        bench.learner.error = TransferError("aborted")
        for actor in bench.actors:
            actor.fail = task_error(TransferError("aborted"))
        bench.actors[7].fail = death or bench.actors[7].fail
        await bench.pool.publish(weights(1))
        await bench.all_serve(1)
        bench.pool.raise_if_broken()
        assert bench.pool.counts == {"lost/transfer": 12, "restarts": 12}
        bench.pool.lose(bench.pool.members[0], "it died", "died")
        bench.pool.raise_if_broken()
        bench.pool.lose(bench.pool.members[1], "it died", "died")
        with pytest.raises(PoolExhausted):
            bench.pool.raise_if_broken()

    run(test, monkeypatch)


def test_a_learner_that_died_is_the_controllers_business(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        bench.learner.error = LearnerError("rank 0 died")
        with pytest.raises(LearnerError, match="rank 0 died"):
            await bench.pool.publish(weights(1))
        bench.learner.error, bench.learner.generation = None, 2
        await bench.pool.publish(weights(2))
        assert bench.learner.groups[1] != bench.learner.groups[0], "another learner: another group"
        await bench.all_serve(2)

    run(test, monkeypatch)


def test_a_version_that_is_published_again_is_for_those_who_lack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One could not fetch it from the store; the others have it and are not interrupted a second time."""

    async def test(bench: Bench) -> None:
        bench.pool.resize(3)
        bench.gone = {2}
        await bench.pool.publish(weights(1))
        async with asyncio.timeout(5):
            while not bench.pool.weights_lost:
                await asyncio.sleep(0.01)
        bench.gone = set()
        await bench.pool.publish(weights(1))
        await bench.all_serve(1)
        assert len(bench.learner.groups) == 1
        assert [actor.fetched for actor in bench.actors] == [[], [], [1, 1]]
        assert [len(actor.received) for actor in bench.actors] == [1, 1, 0]
        await bench.pool.publish(weights(2))
        assert [len(actor.received) for actor in bench.actors] == [2, 2, 1]

    run(test, monkeypatch)
