"""Actors that serve policy versions: each fetches the newest one, and may give its device to the learner in between.

    publish --> every member fetches --> serves it;  sleep --> learner trains --> publish, or wake

A version whose bytes are gone or wrong is the learner's to publish again (`weights_lost`); one that found no room is
fetched again. Meanwhile a member serves its old version, a new member serves nothing, and by a deadline both are lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from orchestration.failures import ActorLost, GroupFailed, InputLost, RunError
from orchestration.pools import ActorPool, Member
from rollout.full_store import PAUSE_S, StoreFull

if TYPE_CHECKING:
    from learner.spec import PublishedWeights

logger = logging.getLogger(__name__)


class VersionedPool(ActorPool):
    """Actors with `update_weights`, `sleep` and `wake`."""

    def __init__(
        self,
        create: Callable[[int], Any],
        size: int,
        *,
        sync_timeout_s: float,
        republish_timeout_s: float | None = None,
        **options: Any,
    ) -> None:
        """`republish_timeout_s`: how long the learner may take to publish a lost version again; None: as a sync."""
        super().__init__(create, size, **options)
        self._sync_timeout_s = sync_timeout_s
        self._republish_timeout_s = republish_timeout_s or sync_timeout_s
        self._newest: PublishedWeights | None = None
        self._lost: PublishedWeights | None = None
        """The newest version, if a member could not get it."""
        self._syncing: set[Member] = set()
        self._resting = False
        """No new work until the next version: the device belongs to the learner."""
        self._asleep: set[Member] = set()
        self._sync_reports: list[Any] = []

    @property
    def weights_lost(self) -> bool:
        """Whether a member could not get the newest version because its bytes are gone or wrong.

        The learner ought to publish it again, under the same number; `changed` is set when this becomes true.
        """
        return self._lost is not None

    async def publish(self, weights: PublishedWeights) -> None:
        """Let every member fetch this version while it goes on generating; slow ones skip versions.

        One that is published again, under the same number, is fetched by those that lack it.
        """
        self._announce(weights)
        self._resting = False
        self._sync_all()

    def _announce(self, weights: PublishedWeights) -> None:
        self._newest, self._lost = weights, None
        self.changed.set()

    def _sync_all(self) -> None:
        for member in self.members:
            if member.ready and member not in self._syncing and self._missing(member):
                self._syncing.add(member)
                self._spawn(self._follow(member), f"sync {member.index}")

    async def _follow(self, member: Member) -> None:
        with suppress(ActorLost):  # its replacement starts by itself
            await self._sync(member)

    def _missing(self, member: Member) -> PublishedWeights | None:
        """The newest version, unless the member serves it."""
        newest = self._newest
        return newest if newest is not None and member.version < newest.manifest.version else None

    async def synchronised(self, publish_again: Callable[[], Awaitable[None]] | None = None) -> None:
        """Wait until every ready member serves the newest version, which is `publish_again`ed where it is lost."""
        while any(member.ready and self._missing(member) for member in self.members):
            self.raise_if_broken()
            if self.weights_lost and publish_again is not None:
                await publish_again()
                continue
            await self._wait_for_change()

    def take_sync_reports(self) -> list[Any]:
        """Reports of the weight updates since the last call."""
        reports, self._sync_reports = self._sync_reports, []
        return reports

    # --- one member and its versions ------------------------------------------------------------------------------

    async def _sync(self, member: Member) -> None:
        """Fetch until the member serves the newest version, or the pool rests: who ends the rest starts it again.

        Raises `ActorLost`, also where the member got none until its deadline.
        """
        self._syncing.add(member)
        failing_since: float | None = None
        try:
            while not self._resting and (weights := self._missing(member)):
                try:
                    await self._fetch(member, weights)
                    failing_since = None
                except (InputLost, StoreFull) as error:
                    if failing_since is None:
                        logger.warning(
                            "%s actor %d stays at version %d: %s", self.name, member.index, member.version, error
                        )
                        failing_since = now()
                    await self._wait_to_try_again(member, weights, error, failing_since)
        finally:
            self._syncing.discard(member)
            self.changed.set()

    async def _fetch(self, member: Member, weights: PublishedWeights) -> None:
        version = weights.manifest.version
        ref = member.actor.update_weights.remote(list(weights.links), list(weights.shards))
        report = await self._order(member, ref, f"weights {version} to reach {self.name} actor {member.index}")
        self._sync_reports.append(report)
        member.version = version
        self._asleep.discard(member)
        self.changed.set()

    async def _wait_to_try_again(
        self, member: Member, weights: PublishedWeights, error: InputLost | StoreFull, failing_since: float
    ) -> None:
        """After a fetch that failed through no fault of the member's; one that failed for too long is lost."""
        gone = isinstance(error, InputLost)
        limit_s = self._republish_timeout_s if gone else self._sync_timeout_s
        left_s = failing_since + limit_s - now()
        if left_s <= 0:
            self.lose(member, f"{error}, and no version reached it for {limit_s:.0f} s", "sync")
            raise ActorLost(str(error)) from error
        if self._newest is not weights:
            return
        if not gone:
            await self._wait_for_another(weights, min(left_s, PAUSE_S))
        elif self._has_started:
            self._lost = weights
            await self._wait_for_another(weights, left_s)
        else:
            raise RunError(f"{error}: nobody publishes it again before the run has started; start it again") from error

    async def _wait_for_another(self, weights: PublishedWeights, seconds: float) -> None:
        """At most so long, less where another version is published or the pool is to rest."""
        self.changed.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._newest is weights and not self._resting:
                    await self._change()

    async def _order(self, member: Member, ref: Any, what: str) -> Any:
        """The answer to a call that is about the member and no group: what it refuses is its own failure."""
        try:
            (answer,) = await self.call(member, [ref], self._sync_timeout_s, what)
        except GroupFailed as refused:
            self.lose(member, str(refused), "error")
            raise ActorLost(what) from refused
        return answer

    async def _prepare(self, member: Member) -> None:
        """Up to date before it serves; asleep while the device belongs to the learner."""
        while True:
            await self._sync(member)
            if self._resting and member not in self._asleep:
                await self._put_to_sleep(member)
            elif not self._resting and member in self._asleep:
                await self._wake(member)
            else:
                return

    # --- a device that is shared with the learner -----------------------------------------------------------------

    async def sleep(self) -> None:
        """Let every member finish what it has, then give its device up until the next version or `wake`."""
        self._resting = True
        self.changed.set()
        while self._syncing or any(member.in_flight for member in self.members if member.ready):
            self.raise_if_broken()
            await self._wait_for_change()
        await asyncio.gather(*(self._put_to_sleep(member) for member in self.members if member.ready))

    async def wake(self) -> None:
        """Serve again at the version of before: there is no new one. Who missed that wakes when it has it."""
        self._resting = False
        self._asleep.intersection_update(self.members)
        await asyncio.gather(*(self._wake(member) for member in list(self._asleep) if not self._missing(member)))
        self._sync_all()
        self.changed.set()

    async def _put_to_sleep(self, member: Member) -> None:
        self._asleep.add(member)
        await self._tell(member, member.actor.sleep.remote(), "fall asleep")

    async def _wake(self, member: Member) -> None:
        await self._tell(member, member.actor.wake.remote(), "wake up")
        self._asleep.discard(member)

    async def _tell(self, member: Member, ref: Any, what: str) -> None:
        with suppress(ActorLost):  # its replacement starts by itself
            await self._order(member, ref, f"{self.name} actor {member.index} to {what}")


def now() -> float:
    """The event loop's clock, in seconds."""
    return asyncio.get_running_loop().time()
