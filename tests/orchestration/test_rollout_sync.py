"""Fetches that fail through nobody's fault: who serves what meanwhile, and who helps; with actors that only pretend."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ObjectReconstructionFailedError, OutOfDiskError

from orchestration import pools, versioned_pool
from orchestration.failures import PoolExhausted, RunError
from orchestration.rollout_pool import RolloutPool
from rollout.transport import Link
from rollout.weights import WeightError
from tests.orchestration.test_late_joiners import places, until, version
from tests.orchestration.test_pools import task_error

GONE = ObjectReconstructionFailedError("00" * 28, "address", "site")
FULL = OutOfDiskError("Local disk is full")
TORN = WeightError("version 5, shard 0: checksum 1, need 2")


class FailingActor:
    """Its fetches end as `outcomes` say, one after another, then well; it notes what it was told, in order."""

    def __init__(self, outcomes: Sequence[Exception] = ()) -> None:
        self.outcomes = list(outcomes)
        self.told: list[int | str] = []
        self.arrived = asyncio.Event()
        self.arrived.set()
        for name in ("ready", "stats", "update_weights", "sleep", "wake", "__ray_call__"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name.strip('_')}")))

    async def _ready(self) -> dict[str, int]:
        return {"progress": 0}

    _stats = _ready

    async def _ray_call(self, function: Any) -> str:
        return "/spilled"

    async def _update_weights(self, links: Sequence[Link], parts: Sequence[Any]) -> dict[str, float]:
        number = links[-1].manifest.version
        self.told.append(number)
        await self.arrived.wait()
        if self.outcomes:
            raise task_error(self.outcomes.pop(0))
        return {"version": number, "fetch_s": 0.5, "pause_s": 0.25, "num_bytes": 10 * number}

    async def _sleep(self) -> None:
        self.told.append("sleep")

    async def _wake(self) -> None:
        self.told.append("wake")


class Bench:
    """A pool and the actors that it creates; `outcomes` are those of the actors to come."""

    def __init__(self, size: int, outcomes: Sequence[Sequence[Exception]], options: dict[str, Any]) -> None:
        self.outcomes = list(outcomes)
        self.actors: list[FailingActor] = []
        defaults = {"sync_timeout_s": 20, "startup_timeout_s": 20, "hang_timeout_s": 20, "restarts": 2}
        self.pool = RolloutPool(self._create, size, request_timeout_s=20, max_in_flight=8, **defaults | options)

    def _create(self, index: int) -> FailingActor:
        self.actors.append(FailingActor(self.outcomes.pop(0) if self.outcomes else ()))
        return self.actors[-1]

    @property
    def versions(self) -> list[int]:
        return [member.version for member in self.pool.members]


Test = Callable[[Bench], Awaitable[None]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(pools, "RESTART_PAUSE_S", 0.0)
    monkeypatch.setattr(versioned_pool, "PAUSE_S", 0.01)

    def run(test: Test, *, size: int = 1, outcomes: Sequence[Sequence[Exception]] = (), **options: Any) -> None:
        async def with_bench() -> None:
            bench = Bench(size, outcomes, options)
            await bench.pool.start()
            try:
                async with asyncio.timeout(5):
                    await test(bench)
            finally:
                bench.pool.kill()

        asyncio.run(with_bench())

    return run


def test_what_found_no_room_is_fetched_again(run: Callable[..., None]) -> None:
    """No later version comes to the rescue: at bound 0 there is none before this one is served."""

    async def test(bench: Bench) -> None:
        await bench.pool.publish(version(1))
        await bench.pool.synchronised()
        assert bench.versions == [1] and bench.actors[0].told == [1, 1, 1]
        assert not bench.pool.weights_lost and not bench.pool.counts

    run(test, outcomes=[[FULL, FULL]])


def test_a_replacement_serves_nothing_before_the_newest_version(run: Callable[..., None]) -> None:
    async def test(bench: Bench) -> None:
        await bench.pool.publish(version(7))
        await bench.pool.synchronised()
        bench.pool.lose(bench.pool.members[0], "killed", "died")
        await until(lambda: len(bench.actors) == 3 and len(bench.actors[2].told) > 1)
        assert places(bench.pool) == {1}, "its first fetch failed"
        await until(lambda: places(bench.pool) == {0, 1})
        assert bench.versions == [7, 7]
        bench.pool.raise_if_broken()

    run(test, size=2, outcomes=[[], [], [FULL] * 5])


@pytest.mark.parametrize("error", [GONE, FULL, TORN])
def test_a_version_that_comes_while_a_fetch_fails_is_fetched_at_once(
    error: Exception, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versioned_pool, "PAUSE_S", 60.0)

    async def test(bench: Bench) -> None:
        bench.actors[0].arrived.clear()
        await bench.pool.publish(version(5))
        await until(lambda: bench.actors[0].told == [5])
        await bench.pool.publish(version(6))
        bench.actors[0].arrived.set()
        await bench.pool.synchronised()
        assert bench.actors[0].told == [5, 6] and bench.versions == [6]
        assert not bench.pool.weights_lost, "nobody needs version 5"

    run(test, outcomes=[[error]])


@pytest.mark.parametrize("error", [GONE, TORN])
def test_a_version_that_is_gone_or_torn_is_the_learners_to_publish_again(
    error: Exception, run: Callable[..., None]
) -> None:
    async def test(bench: Bench) -> None:
        await bench.pool.publish(version(4))
        await bench.pool.synchronised()
        bench.actors[0].outcomes = [error]
        bench.actors[0].arrived.clear()
        await bench.pool.publish(version(5))
        await until(lambda: bench.versions == [4, 5])
        bench.actors[0].arrived.set()
        while not bench.pool.weights_lost:  # as the controller looks: at every change
            bench.pool.changed.clear()
            await bench.pool.changed.wait()
        await asyncio.sleep(0.05)
        assert bench.actors[0].told == [4, 5], "the same bytes are not tried again and again"
        assert bench.versions == [4, 5] and places(bench.pool) == {0, 1}, "it stays on its old version"
        assert bench.pool.reserve(1, lambda served: served == 4) is not None
        await bench.pool.publish(version(5))
        assert not bench.pool.weights_lost
        await bench.pool.synchronised()
        assert [actor.told for actor in bench.actors] == [[4, 5, 5], [4, 5]], "only who lacks it fetches it"
        assert not bench.pool.counts, "nobody was lost"

    run(test, size=2)


def test_the_last_version_of_a_run_is_published_again_too(run: Callable[..., None]) -> None:
    """No controller looks any more; the evaluation at the end needs actors that serve it."""

    async def test(bench: Bench) -> None:
        await bench.pool.publish(version(4))
        await bench.pool.synchronised()
        bench.actors[0].outcomes = [GONE, TORN]
        await bench.pool.publish(version(5))
        await bench.pool.synchronised(lambda: bench.pool.publish(version(5)))
        assert bench.actors[0].told == [4, 5, 5, 5] and bench.versions == [5]
        assert not bench.pool.counts

    run(test)


def test_a_replacement_waits_for_what_is_published_again(run: Callable[..., None]) -> None:
    """The node of the learner is gone, and with it the bytes: the next learner makes a new version of its own."""

    async def test(bench: Bench) -> None:
        await bench.pool.publish(version(5))
        await bench.pool.synchronised()
        bench.pool.lose(bench.pool.members[0], "its node is gone", "died")
        await until(lambda: bench.pool.weights_lost)
        assert places(bench.pool) == set()
        await bench.pool.publish(version(6))
        await until(lambda: places(bench.pool) == {0})
        assert bench.actors[1].told == [5, 6] and not bench.pool.weights_lost

    run(test, outcomes=[[], [GONE]])


def test_who_gets_no_version_until_its_deadline_is_lost(run: Callable[..., None]) -> None:
    async def test(bench: Bench) -> None:
        await bench.pool.publish(version(1))
        await until(lambda: bench.pool.counts["lost/sync"] == 1)
        await until(lambda: places(bench.pool) == {0})
        assert bench.versions == [1] and len(bench.actors[0].told) > 3
        bench.pool.lose(bench.pool.members[0], "killed", "died")
        await until(lambda: bench.pool.counts["lost/sync"] == 2)
        with pytest.raises(PoolExhausted, match=r"weights 1 .*/spilled.* are full.*, and no version .* for 0 s\)"):
            bench.pool.raise_if_broken()

    run(test, outcomes=[[FULL] * 1000, [], [FULL] * 1000], sync_timeout_s=0.1)


def test_the_learner_has_a_deadline_of_its_own_to_publish_again(run: Callable[..., None]) -> None:
    """It may be in the middle of a long step: no reason to give up actors that are well."""

    async def test(bench: Bench) -> None:
        await bench.pool.publish(version(1))
        await asyncio.sleep(0.3)
        assert not bench.pool.counts and bench.pool.weights_lost
        await until(lambda: bench.pool.counts["lost/sync"] == 1)
        assert bench.actors[0].told == [1, 1], "once more before it is given up"

    run(test, outcomes=[[GONE] * 9], sync_timeout_s=0.1, republish_timeout_s=0.6)


def test_an_actor_that_refuses_a_version_is_lost(run: Callable[..., None]) -> None:
    """A ValueError of its engine is no group's fault: it may be torn."""

    async def test(bench: Bench) -> None:
        await bench.pool.publish(version(1))
        await until(lambda: len(bench.actors) == 2 and places(bench.pool) == {0})
        assert bench.pool.counts == {"lost/error": 1, "restarts": 1} and bench.versions == [1]
        bench.pool.raise_if_broken()

    run(test, outcomes=[[ValueError("There is no module or parameter named x")]])


def test_weights_that_are_gone_before_the_run_starts_end_it(run: Callable[..., None]) -> None:
    async def start() -> None:
        bench = Bench(1, [[GONE]], {})
        await bench.pool.publish(version(3))
        with pytest.raises(RunError, match=r"weights 3 to reach rollout actor 0.*start it again"):
            await bench.pool.start()
        bench.pool.kill()

    asyncio.run(start())


def test_reports_of_a_sync_are_handed_on_once(run: Callable[..., None]) -> None:
    async def test(bench: Bench) -> None:
        await bench.pool.publish(version(1))
        await bench.pool.synchronised()
        await bench.pool.publish(version(2))
        await bench.pool.synchronised()
        reports = bench.pool.take_sync_reports()
        assert [report["version"] for report in reports] == [1, 1, 2, 2], "none of the fetch that failed"
        assert {(r["fetch_s"], r["pause_s"]) for r in reports} == {(0.5, 0.25)}
        assert sum(report["num_bytes"] for report in reports) == 60
        assert bench.pool.take_sync_reports() == []

    run(test, size=2, outcomes=[[FULL]])


def test_the_learner_gets_the_device_also_from_who_lacks_a_version(run: Callable[..., None]) -> None:
    """It can publish that version only when it is not asked to train: nobody may wait for it to fall asleep."""

    async def test(bench: Bench) -> None:
        await bench.pool.publish(version(1))
        await until(lambda: bench.pool.weights_lost and bench.versions == [0, 1])
        await bench.pool.sleep()
        assert [actor.told for actor in bench.actors] == [[1, "sleep"], [1, "sleep"]]
        await bench.pool.wake()
        assert bench.actors[1].told == [1, "sleep", "wake"]
        assert bench.pool.reserve(1, lambda served: served == 0) is None, "who lacks the version stays asleep"
        await until(lambda: len(bench.actors[0].told) == 3 and bench.pool.weights_lost)
        await bench.pool.publish(version(1))
        await bench.pool.synchronised()
        assert bench.actors[0].told == [1, "sleep", 1, 1], "loading wakes it"
        assert bench.pool.reserve(1, lambda served: True).member.index == 0  # type: ignore[union-attr]

    run(test, size=2, outcomes=[[GONE, GONE]])


def test_a_replacement_that_lacks_a_version_sleeps_too(run: Callable[..., None]) -> None:
    async def test(bench: Bench) -> None:
        await bench.pool.publish(version(1))
        await bench.pool.synchronised()
        bench.pool.lose(bench.pool.members[0], "killed", "died")
        await until(lambda: len(bench.actors) == 2 and bench.pool.weights_lost)
        await bench.pool.sleep()
        await until(lambda: bench.actors[1].told == [1, "sleep"])
        await bench.pool.publish(version(2))
        await until(lambda: places(bench.pool) == {0} and bench.versions == [2])
        assert bench.actors[1].told == [1, "sleep", 2]
        assert bench.pool.reserve(1, lambda served: served == 2) is not None

    run(test, outcomes=[[], [GONE]])


def test_many_actors_at_one_version_are_judged_once(run: Callable[..., None]) -> None:
    """With a hundred actors and thousands of slots the question itself would stop the driver for seconds."""
    asked: list[int] = []

    def refuse(version: int) -> bool:
        asked.append(version)
        return False

    async def test(bench: Bench) -> None:
        assert bench.pool.seats == 30 * 8 // 3
        assert bench.pool.reserve(1, refuse) is None and asked == [0]
        assert bench.pool.reserve(1, refuse) is None and asked == [0, 0], "versions come and go: not remembered"

    run(test, size=30)
