"""Groups that move: cut on an actor that leaves or is slow, continued on another; with actors that only pretend."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from orchestration import pools, rollout_pool
from orchestration.failures import ActorLost
from orchestration.rollout_pool import Reservation, RolloutPool
from rollout.request import GroupSummary, RolloutRequest

GROUP = [RolloutRequest(f"g/{index}", "g", "p", index, index, (5,)) for index in range(4)]
TIMEOUT_S = 0.4


class PretendedActor:
    """`generate` lasts until `finish`, a cut or its death; batches are strings that tell where they have been."""

    def __init__(self, index: int) -> None:
        self.name = f"actor {index}"
        self.finish = asyncio.Event()
        self.was_cut = asyncio.Event()
        self.dead = asyncio.Event()
        self.answers_cuts = True
        self.calls: list[Any] = []
        self.ready = SimpleNamespace(remote=self._answer)
        self.stats = SimpleNamespace(remote=self._answer)
        self.generate = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=self._generate))
        self.cut = SimpleNamespace(remote=self._cut)
        self.abort = SimpleNamespace(remote=self._abort)

    async def _answer(self) -> dict[str, int]:
        return {"progress": 0}

    def _generate(self, requests: list[RolloutRequest], so_far: str | None) -> tuple[str, Any]:
        self.calls.append(so_far)
        return f"{so_far or 'from'} {self.name}", self._run()

    async def _run(self) -> GroupSummary:
        events = [asyncio.ensure_future(event.wait()) for event in (self.finish, self.was_cut, self.dead)]
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        if self.dead.is_set():
            raise ActorDiedError
        num_cut = 0 if self.finish.is_set() else 3
        self.was_cut.clear()
        return GroupSummary(
            "g", tuple(r.request_id for r in GROUP), (1,) * 4, (1,) * 4, 0, 0, 0, 0.0, 0.0, 1.0, num_cut
        )

    async def _abort(self, request_ids: list[str]) -> list[int]:
        self.calls.append(("abort", len(request_ids)))
        return [7, 9]

    async def _cut(self, request_ids: list[str]) -> int:
        assert request_ids == [request.request_id for request in GROUP]
        if not self.answers_cuts:
            await asyncio.sleep(3600)
        self.was_cut.set()
        return 3


Started = tuple[RolloutPool, list[PretendedActor]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(ray, "kill", lambda actor: actor.dead.set())
    monkeypatch.setattr(pools, "RESTART_PAUSE_S", 0.0)
    monkeypatch.setattr(pools, "RETIRE_POLL_S", 0.01)
    monkeypatch.setattr(rollout_pool, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(rollout_pool, "CUT_DEADLINE_S", 0.1)

    def run(
        test: Callable[[Started], Coroutine[Any, Any, None]], size: int = 2, timeout_s: float = 60.0, **changes: float
    ) -> None:
        async def with_pool() -> None:
            created: list[PretendedActor] = []

            def create(index: int) -> PretendedActor:
                created.append(PretendedActor(index))
                return created[-1]

            options = {"startup_timeout_s": 5.0, "hang_timeout_s": 5.0, "restarts": 3, "sync_timeout_s": 5.0}
            pool = RolloutPool(create, size, request_timeout_s=timeout_s, max_in_flight=8, **options | changes)
            await pool.start()
            try:
                await asyncio.wait_for(test((pool, created)), 5)
                pool.raise_if_broken()
            finally:
                pool.kill()

        asyncio.run(with_pool())

    return run


def begin(pool: RolloutPool) -> tuple[Reservation, asyncio.Task[tuple[Any, GroupSummary]]]:
    room = pool.reserve(len(GROUP), lambda version: True)
    assert room is not None
    return room, asyncio.create_task(pool.generate(room, GROUP))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_shrunken_pool_goes_on_with_what_is_left(run: Callable[..., None]) -> None:
    async def test(started: Started) -> None:
        pool, (first, second) = started
        (kept, _), (moved, call) = begin(pool), begin(pool)
        assert (kept.member.index, moved.member.index) == (0, 1)
        pool.resize(1)
        await until(lambda: len(first.calls) == 2)
        assert first.calls == [None, "from actor 1"], "the reference of the cut batch goes along"
        await until(second.dead.is_set)
        assert moved.member is kept.member and kept.member.in_flight == 8
        first.finish.set()
        batch, summary = await call
        assert batch == "from actor 1 actor 0" and summary.num_cut == 0
        assert summary.seconds == 2.0, "of both parts"
        assert pool.counts == {"cut": 1}
        await until(lambda: kept.member.in_flight == 0)

    run(test)


def test_a_group_waits_where_it_is_until_another_actor_can_take_it(run: Callable[..., None]) -> None:
    """A pool of one on a draining node: decoding goes on until the replacement serves."""

    async def test(started: Started) -> None:
        pool, created = started
        room, call = begin(pool)
        held = asyncio.Event()
        pool._prepare = lambda member: held.wait()  # type: ignore[method-assign, assignment, return-value]
        pool.retire(room.member, 60)
        await asyncio.sleep(0.05)
        assert not created[0].was_cut.is_set() and created[0].calls == [None]
        held.set()
        await until(lambda: len(created) == 2 and created[1].calls == ["from actor 0"])
        created[1].finish.set()
        await call
        assert pool.counts == {"cut": 1, "drained": 1}

    run(test, size=1)


def test_no_group_moves_to_an_older_version(run: Callable[..., None]) -> None:
    async def test(started: Started) -> None:
        pool, (first, second) = started
        newer = pool.members[1]
        newer.version = 3
        room = pool.reserve(4, lambda version: version >= 3)
        assert room is not None
        call = asyncio.create_task(pool.generate(room, GROUP))
        pool.resize(1)
        await asyncio.sleep(0.05)
        assert second.calls == [None] and first.calls == [], "actor 0 serves version 0: the slot promised 3"
        pool.members[0].version = 3
        await until(lambda: first.calls == ["from actor 1"])
        first.finish.set()
        await call

    run(test)


def test_a_late_group_moves_once_another_actor_has_room(run: Callable[..., None]) -> None:
    async def test(started: Started) -> None:
        pool, (first, second) = started
        _, call = begin(pool)
        pool.members[1].in_flight = 8
        await asyncio.sleep(0.6 * TIMEOUT_S)
        assert first.calls == [None] and not first.was_cut.is_set(), "no room elsewhere"
        pool.members[1].in_flight = 0
        await until(lambda: second.calls == ["from actor 0"])
        await asyncio.sleep(0.7 * TIMEOUT_S)
        assert first.calls == [None, "from actor 0 actor 1"], "late again, with a deadline of its own"
        first.finish.set()
        batch, _ = await call
        assert pool.counts == {"cut": 2} and batch == "from actor 0 actor 1 actor 0"

    run(test, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("leaves", [False, True])
def test_an_actor_that_does_not_answer_a_cut_is_lost_with_its_work(leaves: bool, run: Callable[..., None]) -> None:
    async def test(started: Started) -> None:
        pool, created = started
        created[0].answers_cuts = False
        room, call = begin(pool)
        if leaves:
            pool.retire(room.member, 60)
        with pytest.raises(ActorLost):
            await call
        assert created[0].dead.is_set() and room.member.in_flight == 0
        assert pool.counts == ({"drained": 1} if leaves else {"lost/cut": 1, "restarts": 1})

    run(test, timeout_s=60.0 if leaves else TIMEOUT_S)


def test_a_cancelled_group_is_aborted_where_it_has_gone(run: Callable[..., None]) -> None:
    async def test(started: Started) -> None:
        pool, (first, second) = started
        pool.members[0].in_flight = 1
        _, call = begin(pool)
        pool.resize(1)
        await until(lambda: first.calls == ["from actor 1"])
        call.cancel("age")
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: pool.counts["aborted_age_tokens"] == 16)
        assert first.calls[-1] == ("abort", 4) and second.calls == [None]
        assert pool.counts["aborted_age_responses"] == 2 and pool.members[0].in_flight == 1

    run(test)


def test_a_cut_group_that_nobody_can_take_is_lost_by_its_own_deadline(run: Callable[..., None]) -> None:
    """However much else changes in the pool meanwhile."""

    async def test(started: Started) -> None:
        pool, created = started
        pool.members[1].version = 3
        room = pool.reserve(4, lambda version: version == 3)
        assert room is not None
        call = asyncio.create_task(pool.generate(room, GROUP))
        await until(lambda: created[1].calls == [None])
        pool.resize(1)
        created[1].was_cut.set()
        while not call.done():
            pool.changed.set()
            await asyncio.sleep(0.02)
        with pytest.raises(ActorLost, match="waited 0 s for a rollout actor at version 3 or newer, for a cut group"):
            await call
        assert room.member.in_flight == 0

    run(test, startup_timeout_s=0.2, hang_timeout_s=0.2)
