"""Whose fault a failed call is: the member's, its argument's or the group's; and when a pool gives up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ObjectReconstructionFailedError,
    OutOfDiskError,
    OutOfMemoryError,
    RayTaskError,
)

from orchestration import pools
from orchestration.failures import ActorLost, DeadlineExceeded, GroupFailed, InputLost, PoolExhausted
from orchestration.pools import ActorPool
from orchestration.verifier_pool import VerifierPool
from rollout.full_store import StoreFull
from rollout.weights import WeightError
from tests.orchestration.test_retiring import fake_actor


def task_error(cause: Exception) -> BaseException:
    """What `await ref` raises when an actor's method raised `cause`."""
    return RayTaskError("score", "traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "raised", "replaced"),
    [
        (ActorDiedError(), ActorLost, 1),
        (OutOfMemoryError("killed by the memory monitor"), ActorLost, 1),
        (task_error(RuntimeError("broken engine")), ActorLost, 1),
        (task_error(ObjectReconstructionFailedError("00" * 28, "address", "site")), InputLost, 0),
        (task_error(WeightError("shard 0: checksum 1, need 2")), InputLost, 0),
        (task_error(OutOfDiskError("Local disk is full")), StoreFull, 0),
        (task_error(ValueError("prompt too long")), GroupFailed, 0),
    ],
)
def test_who_pays_for_a_failed_call(
    error: BaseException, raised: type[Exception], replaced: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(pools.ray, "kill", killed.append)

    async def run() -> None:
        pool = ActorPool(fake_actor, 2, startup_timeout_s=5, hang_timeout_s=5, restarts=1)
        await pool.start()
        reply = asyncio.get_running_loop().create_future()
        reply.set_exception(error)
        with pytest.raises(raised, match="grades"):
            await pool.call(pool.members[0], [reply], 5, "grades")
        assert (len(killed), pool.counts["restarts"]) == (replaced, replaced)
        pool.raise_if_broken()
        pool.kill()

    asyncio.run(run())


@pytest.mark.parametrize(("node", "restarts"), [(None, 1), ("node-1", 2)])
def test_a_replacement_without_a_place_is_waited_for(
    node: str | None, restarts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as others serve; one that has a place and does not start is replaced like any other."""
    monkeypatch.setattr(pools.ray, "kill", lambda actor: None)
    monkeypatch.setattr(pools, "RESTART_PAUSE_S", 0.0)
    monkeypatch.setattr(pools, "node_of", lambda actor: node)
    started: list[int] = []

    def create(index: int) -> Any:
        actor = fake_actor(index)
        started.append(index)
        if started[2:]:
            actor.ready.remote = lambda: asyncio.sleep(60)
        return actor

    async def run() -> None:
        pool = ActorPool(create, 2, startup_timeout_s=0.2, hang_timeout_s=5, restarts=2)
        await pool.start()
        pool.lose(pool.members[0], "its node is gone", "died")
        async with asyncio.timeout(5):
            while node is not None and pool.counts["restarts"] < restarts:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.7 if node is None else 0.0)
        assert pool.counts["restarts"] == restarts
        pool.raise_if_broken()
        pool.kill()

    asyncio.run(run())


def test_a_spent_budget_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools.ray, "kill", lambda actor: None)

    async def run() -> None:
        pool = ActorPool(fake_actor, 1, startup_timeout_s=5, hang_timeout_s=5, restarts=0)
        await pool.start()
        pool.lose(pool.members[0], "it died", "died")
        with pytest.raises(PoolExhausted, match=r"actor 0 was lost \(it died\).*raise pipeline.max_restarts"):
            pool.raise_if_broken()
        pool.kill()

    asyncio.run(run())


@pytest.mark.parametrize(("num_waiting", "deadline_s"), [(1, 0.2), (6, 0.8)])
def test_a_group_waits_for_a_verifier_by_a_deadline_of_its_own(
    num_waiting: int, deadline_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever changes meanwhile; longer the more groups wait already: every two need the two members' 0.2 s."""
    monkeypatch.setattr(pools.ray, "kill", lambda actor: None)
    options = {"startup_timeout_s": 0.1, "hang_timeout_s": 0.1, "restarts": 0}

    async def run() -> None:
        pool = VerifierPool(fake_actor, 2, group_timeout_s=0.2, groups_per_member=1, **options)
        await pool.start()
        for member in pool.members:
            member.in_flight = 1
        waits = [asyncio.create_task(pool.score("batch", "1", "math")) for _ in range(num_waiting)]
        started = asyncio.get_running_loop().time()
        async with asyncio.timeout(5):
            while not waits[-1].done():
                pool.changed.set()
                await asyncio.sleep(0.02)
        assert deadline_s - 0.05 < asyncio.get_running_loop().time() - started < deadline_s + 1
        for place, wait in enumerate(waits, start=1):
            with pytest.raises(DeadlineExceeded, match=rf"for a verifier with room \({place} groups wait\)"):
                await wait
        with pytest.raises(DeadlineExceeded, match=r"\(1 groups wait\)"):
            await pool.score("batch", "1", "math")
        pool.kill()

    asyncio.run(run())
