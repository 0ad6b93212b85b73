"""Rollout actors whose new versions come from the learner by NCCL (`pipeline.transport: nccl`).

publish: learner.broadcast ==NCCL==> actor.receive_weights of every member that serves
         the others fetch from the object store; so does the replacement of one whose transfer failed
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayTaskError

from learner.group import LearnerGroup
from orchestration.failures import DeadlineExceeded, one_line, within
from orchestration.pools import Member
from orchestration.rollout_pool import RolloutPool
from rollout.nccl_transfer import CONNECT_DEADLINE_S, Broadcast, NcclGroup, TransferError
from rollout.weights import WeightError

if TYPE_CHECKING:
    from learner.spec import PublishedWeights

logger = logging.getLogger(__name__)


class BroadcastPool(RolloutPool):
    """A rollout pool with a learner beside it."""

    def __init__(self, learner: LearnerGroup, tensor_parallel_size: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._learner = learner
        self._tensor_parallel_size = tensor_parallel_size
        self._group: NcclGroup | None = None
        self._made_of: tuple[int, list[Member]] = (0, [])
        """The learner's generation and the members in `_group`."""

    async def publish(self, weights: PublishedWeights) -> None:
        """Bring this version to every serving member at once; the others fetch it. Raises `LearnerError`.

        One that is published again is not broadcast: it is for those that could not fetch it.
        """
        again = self._newest is not None and self._newest.manifest.version == weights.manifest.version
        self._announce(weights)
        members = [member for member in self.members if member.ready and member not in self._syncing]
        if members and not again:
            await self._broadcast(weights, members)
        await super().publish(weights)

    async def _broadcast(self, weights: PublishedWeights, members: list[Member]) -> None:
        manifest, digest = weights.manifest, weights.links[-1].digest
        if digest is None:
            raise WeightError(f"version {manifest.version} has no digest: set transport: nccl on both ends")
        group = await self._group_of(members)
        receiving = [
            within(
                member.actor.receive_weights.remote(Broadcast(manifest, digest, group, engine)),
                CONNECT_DEADLINE_S + 2 * group.deadline_s,
                f"version {manifest.version} over NCCL to reach rollout actor {member.index}",
            )
            for engine, member in enumerate(members)
        ]
        sending = self._learner.broadcast(manifest, group)
        sent, *received = await asyncio.gather(sending, *receiving, return_exceptions=True)
        for member, report in zip(members, received, strict=True):
            if not isinstance(report, BaseException):
                self._sync_reports.append(report)
                member.version = manifest.version
        failed = {m: report for m, report in zip(members, received, strict=True) if isinstance(report, BaseException)}
        self._replace(failed, together=isinstance(sent, TransferError))
        self.changed.set()
        if isinstance(sent, TransferError):
            self._group = None
            logger.warning("version %d was not broadcast to all: %s", manifest.version, sent)
        elif isinstance(sent, BaseException):
            raise sent

    def _replace(self, failed: dict[Member, BaseException], *, together: bool) -> None:
        """Lose those that a version did not reach; one that dies takes the others along (`together`) and pays alone."""
        if failed:
            self._group = None
        died = [member for member, report in failed.items() if not isinstance(report, RayTaskError | DeadlineExceeded)]
        charged = (died or list(failed)[:1]) if together else list(failed)
        for member in sorted(failed, key=charged.__contains__, reverse=True):
            self.lose(member, one_line(failed[member]), "transfer", charged=member in charged)

    async def _group_of(self, members: list[Member]) -> NcclGroup:
        """The group in use, or a new one where others serve now, another learner sends, or a transfer failed."""
        made_of = (self._learner.generation, members)
        if self._group is None or made_of != self._made_of:
            address, port = await self._learner.endpoint()
            self._group = NcclGroup(address, port, len(members), self._tensor_parallel_size, self._sync_timeout_s)
            self._made_of = made_of
        return self._group
