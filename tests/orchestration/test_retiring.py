"""A pool member whose node goes: replaced at once, allowed to finish what it has, at no cost to the restart budget."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration import pools
from orchestration.pools import ActorPool


def fake_actor(index: int) -> Any:
    async def answer() -> dict[str, int]:
        return {"progress": 0}

    async def run(function: Any) -> str:
        return f"{function.__name__} of node {index}"

    methods = {"ready": answer, "stats": answer, "__ray_call__": run}
    return SimpleNamespace(index=index, **{name: SimpleNamespace(remote=method) for name, method in methods.items()})


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Actors that were killed, in order."""
    seen: list[Any] = []
    monkeypatch.setattr(pools.ray, "kill", seen.append)
    monkeypatch.setattr(pools, "RESTART_PAUSE_S", 0.0)
    monkeypatch.setattr(pools, "RETIRE_POLL_S", 0.01)
    return seen


def pool() -> ActorPool:
    return ActorPool(fake_actor, 2, startup_timeout_s=5, hang_timeout_s=5, restarts=0)


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def test_it_finishes_its_work_while_another_takes_over(killed: list[Any]) -> None:
    async def run() -> None:
        members = pool()
        await members.start()
        old = members.members[0]
        old.in_flight = 3
        members.retire(old, 60)
        assert members.least_loaded(lambda member: member is old) is None, "no new work for it"
        await until(lambda: members.members[0].ready)
        assert members.members[0] is not old
        assert killed == [], "it still has requests in flight"
        old.in_flight = 0
        await until(lambda: killed == [old.actor])
        assert members.counts == {"drained": 1}
        members.raise_if_broken()
        members.kill()

    asyncio.run(run())


def test_the_deadline_ends_it(killed: list[Any]) -> None:
    async def run() -> None:
        members = pool()
        await members.start()
        old = members.members[1]
        old.in_flight = 1
        members.retire(old, 0.05)
        await until(lambda: killed == [old.actor])
        members.kill()

    asyncio.run(run())


def test_told_twice_it_is_replaced_once(killed: list[Any]) -> None:
    async def run() -> None:
        members = pool()
        await members.start()
        old = members.members[0]
        members.retire(old, 1)
        replacement = members.members[0]
        members.retire(old, 1)
        members.lose(old, "its node is gone", "died")
        assert members.members[0] is replacement
        members.raise_if_broken()
        members.kill()

    asyncio.run(run())
