"""Pools of Ray actors that may die at any time: pick a member, call it with a deadline, replace it when it is lost.

A lost member costs its own calls (`ActorLost`; the controller dispatches them again) and one restart of the budget.
Ray restarts none: a replacement starts from the checkpoint, fetches the newest weights, and only then serves. A first
member that is killed or hangs while it starts is replaced like any other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, ObjectLostError, RayError, RayTaskError, RuntimeEnvSetupError

from orchestration.draining import node_of
from orchestration.failures import (
    ActorLost,
    DeadlineExceeded,
    GroupFailed,
    InputLost,
    PoolExhausted,
    RunError,
    one_line,
    within,
)
from rollout.full_store import is_store_full, store_full
from rollout.weights import WeightError

logger = logging.getLogger(__name__)

PING_EVERY_S = 5.0
PING_DEADLINE_S = 60.0
RESTART_PAUSE_S = 1.0
RETIRE_POLL_S = 0.2


@dataclass(slots=True, eq=False)
class Member:
    """One actor of a pool; a replacement is a new member with the same index."""

    index: int
    actor: Any
    version: int = 0
    """Policy version that it serves (rollout members)."""
    failed_starts: int = 0
    """Actors before it, one after another, that never served."""
    ready: bool = False
    stats: dict[str, Any] = field(default_factory=dict)
    """Its counters at the last ping: no change while it has work is no progress."""
    progressed_at: float = field(default_factory=time.monotonic)
    _in_flight: int = 0
    _busy_s: float = 0.0
    _counted_at: float = field(default_factory=time.monotonic)

    @property
    def in_flight(self) -> int:
        """Requests dispatched to it and not answered."""
        return self._in_flight

    @in_flight.setter
    def in_flight(self, count: int) -> None:
        self._count_busy(time.monotonic())
        self._in_flight = count

    def take_busy_s(self, now: float) -> float:
        """Seconds with at least one request in flight since the last call."""
        self._count_busy(now)
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s

    def _count_busy(self, now: float) -> None:
        if self._in_flight:
            self._busy_s += now - self._counted_at
        self._counted_at = now


class ActorPool:
    """`size` actors of one kind, each created by `create(index)`."""

    name = "pool"

    def __init__(
        self, create: Callable[[int], Any], size: int, *, startup_timeout_s: float, hang_timeout_s: float, restarts: int
    ) -> None:
        self._create = create
        self._startup_timeout_s = startup_timeout_s
        self._hang_timeout_s = hang_timeout_s
        self._idle_deadline_s = startup_timeout_s + hang_timeout_s
        self._restarts_left = restarts
        self._members = {index: Member(index, create(index)) for index in range(size)}
        self.counts: Counter[str] = Counter()
        """restarts, lost/<cause>"""
        self.changed = asyncio.Event()
        """Set whenever a member becomes ready, free or newer; whoever waits clears it."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._fatal: BaseException | None = None
        self._has_started = False
        self._idle_since = time.monotonic()

    @property
    def members(self) -> list[Member]:
        """Every member, starting ones included; who leaves is none any more."""
        return list(self._members.values())

    async def start(self) -> None:
        """Wait until every member serves, then watch them.

        Raises `RunError` if one cannot start: at once where its code says why, `PoolExhausted` where all of them die.
        """
        for member in self.members:
            self._spawn(self._start(member), f"start {member.index}")
        self._spawn(self._watch(), "watch")
        while not all(member.ready for member in self.members):  # every start has its own deadline
            self.raise_if_broken()
            await self._change()
        self._has_started = True
        self.take_idle_share()  # counts from here: a pool that starts is not idle

    def raise_if_broken(self) -> None:
        """Re-raise what a background task of the pool died of (`PoolExhausted` above all)."""
        if self._fatal is not None:
            raise self._fatal

    def take_idle_share(self) -> float:
        """Share of its members' time since the last call in which they had nothing to do, or were starting."""
        now = time.monotonic()
        members_s, self._idle_since = len(self._members) * (now - self._idle_since), now
        busy_s = sum(member.take_busy_s(now) for member in self.members)
        return max(0.0, 1 - busy_s / members_s) if members_s else 0.0

    def kill(self) -> None:
        """End every actor and background task."""
        for task in self._tasks:
            task.cancel()
        for member in self.members:
            ray.kill(member.actor)

    def resize(self, size: int) -> None:
        """Grow (new members serve once they are up to date) or shrink (the last ones give up their work first)."""
        for index in range(size):
            if index not in self._members:
                self._add(index)
        for member in self.members:
            if member.index >= size:
                member.ready = False
                del self._members[member.index]
                self._spawn(self._let_finish(member, self._idle_deadline_s), f"retire {member.index}")

    def _add(self, index: int, failed_starts: int = 0) -> None:
        member = Member(index, self._create(index), failed_starts=failed_starts)
        self._members[index] = member
        self._spawn(self._start(member, RESTART_PAUSE_S), f"start {index}")

    async def _add_later(self, lost: Member) -> None:
        """The next one after some that did not start, later each time.

        Until Ray has noticed that a node is lost (16 s by default) it sends actors there: they die at once, and would
        spend the whole budget in that time.
        """
        failed_starts = lost.failed_starts + 1
        await asyncio.sleep(RESTART_PAUSE_S * 4 ** min(failed_starts, 2))
        if self._members.get(lost.index) is lost:
            self._add(lost.index, failed_starts)

    def least_loaded(self, accept: Callable[[Member], bool] = lambda member: True) -> Member | None:
        """The ready member with the fewest requests among those accepted."""
        candidates = [member for member in self.members if member.ready and accept(member)]
        return min(candidates, key=lambda member: (member.in_flight, member.index), default=None)

    async def call(self, member: Member, refs: Sequence[Any], deadline_s: float, what: str) -> list[Any]:
        """Await all refs of one actor call.

        Raises `ActorLost` (and replaces the member), `InputLost` (the argument's fault alone: gone, or torn weights),
        `StoreFull` (nobody's) or `GroupFailed`.
        """
        try:
            return await within(asyncio.gather(*refs), deadline_s, what)
        except RayTaskError as error:
            cause = error.cause
            if is_store_full(error):
                raise await store_full(what, member.actor) from error
            if isinstance(cause, ObjectLostError):
                raise InputLost(f"{what}: {type(cause).__name__}") from error
            if isinstance(cause, WeightError):
                raise InputLost(f"{what}: {one_line(cause)}") from error
            if isinstance(error, ValueError):
                raise GroupFailed(f"{what}: {cause}") from error
            self.lose(member, f"{what}: {one_line(error)}", "error")
        except RayError as error:  # also what Ray's memory monitor kills, which is no RayActorError
            self.lose(member, f"{what}: {type(error).__name__}", "died")
        except DeadlineExceeded as error:
            self.lose(member, str(error), "deadline")
        raise ActorLost(what)

    def lose(self, member: Member, reason: str, cause: str, *, charged: bool = True) -> None:
        """Take a member out, kill what is left of it and start a replacement (once, however many calls notice).

        Not `charged` to the restart budget where another one's loss, which is, took this one along.
        """
        if self._members.get(member.index) is not member or self._fatal is not None:
            return
        logger.warning("%s actor %d lost: %s", self.name, member.index, reason)
        self.counts[f"lost/{cause}"] += 1
        member.ready = False
        ray.kill(member.actor)
        if charged and self._restarts_left == 0:
            self._fatal = PoolExhausted(
                f"{self.name} actor {member.index} was lost ({reason}) and the restart budget is spent; "
                "raise pipeline.max_restarts, or look at the actor's log for the cause"
            )
            self.changed.set()
            return
        self._restarts_left -= charged
        self.counts["restarts"] += 1
        if cause == "start":
            self._spawn(self._add_later(member), f"start {member.index} later")
        else:
            self._add(member.index)

    def retire(self, member: Member, seconds: float) -> None:
        """Replace a member that still works but whose node goes in `seconds`: it may finish what it has until then.

        Costs nothing of the restart budget: preemption is not the member's fault.
        """
        if self._members.get(member.index) is not member or self._fatal is not None:
            return
        self.counts["drained"] += 1
        member.ready = False
        self._add(member.index)
        self._spawn(self._let_finish(member, seconds), f"retire {member.index}")

    async def _let_finish(self, member: Member, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        try:
            while member.in_flight and time.monotonic() < deadline:
                await asyncio.sleep(RETIRE_POLL_S)
        finally:
            ray.kill(member.actor)

    async def _start(self, member: Member, pause_s: float = 0.0) -> None:
        """Bring a member up; one that dies or hangs meanwhile is replaced."""
        await asyncio.sleep(pause_s)
        try:
            await self._bring_up(member)
        except ActorLost:
            return  # while it was made ready to serve: its replacement is on its way
        except DeadlineExceeded as error:
            self._did_not_start(member, error)
        except RayError as error:
            if not self._has_started and _is_own_fault(error):
                raise self._cannot_start(error) from error  # its own code raised: another one would too
            self.lose(member, f"start-up: {one_line(error)}", "start")

    def _cannot_start(self, error: RayError) -> RunError:
        cause = getattr(error, "cause", None) or error
        return RunError(f"a {self.name} actor cannot start: {type(cause).__name__}: {cause}")

    def _did_not_start(self, member: Member, late: DeadlineExceeded) -> None:
        """Replace one that hangs; wait on for a place while others serve. Raises `late` where the pool cannot start."""
        if not self._has_started and (member.failed_starts or node_of(member.actor) is None):
            raise late  # hung twice, or the cluster is too small: the whole budget would say no more, an hour later
        if self._lacks_a_place(member):
            logger.warning("%s; the pool goes on with its other actors", late)
            self._spawn(self._start(member, RESTART_PAUSE_S), f"start {member.index}")
        else:
            self.lose(member, f"start-up: {one_line(late)}", "start")

    def _lacks_a_place(self, member: Member) -> bool:
        """Whether the cluster has no room for it (its node is gone, no other came) while others of the pool serve."""
        current = self._members.get(member.index) is member
        return current and any(other.ready for other in self.members) and node_of(member.actor) is None

    async def _bring_up(self, member: Member) -> None:
        what = f"{self.name} actor {member.index} to start (is the cluster large enough for it?)"
        await within(member.actor.ready.remote(), self._startup_timeout_s, what)
        await self._prepare(member)
        member.progressed_at = time.monotonic()
        member.ready = self._members.get(member.index) is member
        self.changed.set()

    async def _prepare(self, member: Member) -> None:
        """What a new member needs before it serves. Raises `ActorLost` when it will not."""

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PING_EVERY_S)
            await asyncio.gather(*(self._ping(member) for member in self.members if member.ready))

    async def _ping(self, member: Member) -> None:
        try:
            stats = await within(member.actor.stats.remote(), PING_DEADLINE_S, f"a ping of {self.name} {member.index}")
        except (RayError, DeadlineExceeded) as error:
            self.lose(member, one_line(error), "ping")
            return
        now = time.monotonic()
        if stats != member.stats or member.in_flight == 0:
            member.stats, member.progressed_at = stats, now
        elif now - member.progressed_at > self._hang_timeout_s:
            idle = now - member.progressed_at
            self.lose(member, f"{member.in_flight} requests in flight and no progress for {idle:.0f} s", "hang")

    async def _change(self) -> None:
        """Until the next change, which nothing may promise: only inside of a wait that has a deadline."""
        self.changed.clear()
        await self.changed.wait()

    async def _wait_for_change(self) -> None:
        await within(self._change(), self._idle_deadline_s, f"a {self.name} actor to be free or up to date")

    def _spawn(self, work: Any, what: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"{self.name}: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self._fatal is None:
            self._fatal = task.exception()
            self.changed.set()


def _is_own_fault(error: RayError) -> bool:
    """Whether an actor's code, packages or resources keep it from starting: another one would not start either."""
    hopeless = isinstance(error, RayTaskError | RuntimeEnvSetupError | ActorUnschedulableError)
    return hopeless or getattr(error, "actor_init_failed", False)
