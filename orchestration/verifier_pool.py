"""Verifier actors as a pool: whoever is free grades the next group."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestration.failures import ActorLost, GroupFailed, within
from orchestration.pools import ActorPool, Member

if TYPE_CHECKING:
    from reward.verdict import Grade


class VerifierPool(ActorPool):
    """Verifier actors; each grades as many groups at a time as it has children."""

    name = "verifier"
    ATTEMPTS = 3

    def __init__(
        self, create: Callable[[int], Any], size: int, *, group_timeout_s: float, groups_per_member: int, **options: Any
    ) -> None:
        super().__init__(create, size, **options)
        self._group_timeout_s = group_timeout_s
        self._groups_per_member = groups_per_member
        self._num_waiting = 0

    async def score(self, batch: Any, gold: str | dict[str, Any], rule: str) -> list[Grade]:
        """Grade every row of a batch.

        Raises `InputLost` when the batch is gone and `GroupFailed` when no member could within three attempts.
        """
        for _ in range(self.ATTEMPTS):
            member = await self._free_member()
            member.in_flight += 1
            try:
                ref = member.actor.score.remote(batch, gold, rule)
                (grades,) = await self.call(
                    member, [ref], self._group_timeout_s, f"grades from verifier {member.index}"
                )
                return grades
            except ActorLost:
                continue
            finally:
                member.in_flight -= 1
                self.changed.set()
        raise GroupFailed(f"verifier lost {self.ATTEMPTS} times on the same group")

    async def _free_member(self) -> Member:
        """The next member with room, by a deadline from now on that leaves time for whoever waits already."""
        self._num_waiting += 1
        seats = max(1, len(self._members)) * self._groups_per_member
        deadline_s = self._idle_deadline_s + self._num_waiting // seats * self._group_timeout_s
        try:
            return await within(
                self._next_free(), deadline_s, f"a verifier with room ({self._num_waiting} groups wait)"
            )
        finally:
            self._num_waiting -= 1

    async def _next_free(self) -> Member:
        while True:
            self.raise_if_broken()
            if member := self.least_loaded(lambda member: member.in_flight < self._groups_per_member):
                return member
            await self._change()
