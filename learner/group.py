"""The learner as the driver sees it: a group of ranks that live and die together (asyncio, no torch).

    start --> (fetch, train --> publish)* --> save, export --> kill
                 a rank fails or a deadline passes: the generation is killed, `LearnerError` names rank and phase

A generation is one process group: ranks cannot be replaced one by one, because the survivors of a broken collective
hang (NCCL) or are half a step ahead (gloo). After a failure call `start` again with a checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learner.actor import LearnerRank
from learner.collapse_watch import CollapseWatch
from learner.mismatch_watch import MismatchWatch
from learner.saved import until_visible
from learner.spec import (
    BatchesLost,
    LearnerError,
    LearnerSpec,
    PublishedWeights,
    Refused,
    ReplayError,
    ScoredGroup,
)
from rollout.full_store import PAUSE_S, StoreFull, is_store_full, store_full
from rollout.nccl_transfer import CONNECT_DEADLINE_S, NcclGroup, TransferError
from rollout.transport import WeightChain
from rollout.weights import WeightManifest

__all__ = ["LearnerError", "LearnerGroup", "LearnerSpec", "PublishedWeights", "ReplayError", "ScoredGroup"]

logger = logging.getLogger(__name__)

NODE_LOSS_S = 60.0
"""Within this time Ray has noticed a lost node: by default it gives one up after five health checks in 16 s."""
PLACE_POLL_S = 1.0
SETTLE_S = 2.0
"""After a first failure the other ranks get this long to fail too: the dead rank names the cause, its peers echo it."""


class LearnerGroup:
    """`spec.world_size` learner ranks; `rank_options` are the Ray options of each (num_cpus, num_gpus, ...)."""

    def __init__(self, spec: LearnerSpec, rank_options: dict[str, Any]) -> None:
        self.spec = spec
        self._rank_options = rank_options
        self._ranks: list[Any] = []
        self._chain: WeightChain[Any] = WeightChain()
        self._collapse = CollapseWatch()
        self._mismatch = MismatchWatch(spec.dtype, spec.likelihood)
        self._published: int | None = None
        """Version of the weights that the ranks have now, 0 of the model itself; None where they were not published."""
        self.generation = 0

    @property
    def ranks(self) -> Sequence[Any]:
        """Handles of the current generation, by rank."""
        return tuple(self._ranks)

    @property
    def alive(self) -> bool:
        """Whether a generation was started and not killed."""
        return bool(self._ranks)

    async def start(self, checkpoint: Path | None) -> dict[str, Any]:
        """Start a generation from the model, or from a checkpoint; facts of rank 0 (parameters, versions, pids).

        Raises `LearnerError` if a rank fails or `startup_timeout_s` passes (also while Ray finds no place for it).
        """
        self.kill()
        self._published = 0 if checkpoint is None else None
        self.generation += 1
        started = time.monotonic()
        deadline = started + self.spec.startup_timeout_s
        master = await self._place_ranks(deadline)
        place = None if checkpoint is None else str(checkpoint)
        calls = [rank.start.remote(master, place) for rank in self._ranks]
        try:
            facts = await self._collect("start", calls, deadline)
        except LearnerError as error:
            if time.monotonic() - started < min(self.spec.startup_timeout_s, self.spec.collective_timeout_s):
                raise
            raise LearnerError(f"{error}; {self._start_timeouts(checkpoint)}") from error.__cause__
        return {**facts[0], "pids": [fact["pid"] for fact in facts], "generation": self.generation}

    def _start_timeouts(self, checkpoint: Path | None) -> str:
        """What a start that took too long may do about it."""
        waits = "all wait for the last to load the model"
        if checkpoint is not None:
            waits = (
                f"where {checkpoint} was saved by another number of ranks than {self.spec.world_size}, all wait for "
                "the first to convert it"
            )
        return (
            f"raise learner.startup_timeout_s={self.spec.startup_timeout_s:g} and learner.collective_timeout_s="
            f"{self.spec.collective_timeout_s:g} if it needs longer: {waits}"
        )

    async def _place_ranks(self, deadline: float) -> tuple[str, int]:
        """Create the ranks; address and port of the first.

        Until Ray has noticed that a node is lost it sends ranks there, which die at once: not a failure of the learner.
        """
        import ray

        options = {"max_restarts": 0, "max_task_retries": 0, **self._rank_options}
        actor_class = ray.remote(LearnerRank).options(**options)
        noticed = min(deadline, time.monotonic() + NODE_LOSS_S)
        while True:
            await self._wait_for_place(deadline)
            self._ranks = [actor_class.remote(self.spec, rank) for rank in range(self.spec.world_size)]
            try:
                master: tuple[str, int]
                (master,) = await self._collect("rendezvous", [self._ranks[0].rendezvous.remote()], deadline)
                return master
            except LearnerError as error:
                known = self.generation == 1 or not _is_death(error.__cause__)
                if known or time.monotonic() > noticed:
                    raise
                logger.warning("%s (is its node lost? trying again)", error)
                await asyncio.sleep(PLACE_POLL_S)

    async def _wait_for_place(self, deadline: float) -> None:
        """Until Ray has moved what was reserved on a lost node: a rank that is sent there dies at once."""
        group = getattr(self._rank_options.get("scheduling_strategy"), "placement_group", None)
        while group is not None and not await asyncio.to_thread(_on_living_nodes, group):
            if time.monotonic() > deadline:
                raise LearnerError(
                    f"learner generation {self.generation}: no place for its ranks after "
                    f"{self.spec.startup_timeout_s:.0f} s: their node is lost and no other has room"
                )
            await asyncio.sleep(PLACE_POLL_S)

    async def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        """Training step number `step` (from 0) on all ranks. Metrics are named `area/name`.

        Raises `ReplayError` if nothing can be trained and `BatchesLost` if batches exist nowhere any more: the ranks
        stay alive, the step is not counted.
        """
        calls = [rank.fetch.remote(list(groups)) for rank in self._started()]
        lost = await self._collect("fetch", calls, self._deadline(self.spec.sync_timeout_s + SETTLE_S))
        if any(lost):
            raise BatchesLost(sorted({group_id for of_rank in lost for group_id in of_rank}))
        calls = [rank.train.remote(step) for rank in self._started()]
        metrics = await self._collect("train", calls, self._deadline(self.spec.step_timeout_s))
        version, self._published = self._published, None
        return {**metrics[0], **self._watched(metrics[0], step, version)}

    def _watched(self, metrics: dict[str, float], step: int, version: int | None) -> dict[str, float]:
        """What the watches say about a step, also logged."""
        collapse = self._collapse.observe(metrics)
        for warning in (collapse, self._mismatch.observe(metrics, version)):
            if warning:
                logger.warning("step %d: %s", step, warning)
        said = {"objective/collapse_warning": float(collapse is not None)}
        if self._mismatch.alarm is not None:
            said["mismatch/alarm"] = float(self._mismatch.alarm)
        return said

    async def publish(self, version: int) -> PublishedWeights:
        """The current weights, labelled `version`, as objects owned by the caller: they survive the learner.

        Raises `StoreFull`, and ends the group, where the object store had no room for them all the time.
        """
        deadline = self._deadline(self.spec.sync_timeout_s)
        while True:
            try:
                return await self._publish_once(version, deadline)
            except StoreFull as error:
                if time.monotonic() + PAUSE_S > deadline:
                    self.kill()
                    raise
                logger.warning("%s (trying again)", error)
                await asyncio.sleep(PAUSE_S)

    async def _publish_once(self, version: int, deadline: float) -> PublishedWeights:
        first, *others = self._started()
        streamed = first.publish.options(num_returns="streaming").remote(version)
        drained = [rank.publish.options(num_returns="streaming").remote(version) for rank in others]
        tasks = [self._receive(streamed), *(self._receive(stream) for stream in drained)]
        received = await self._settle("publish", [asyncio.ensure_future(task) for task in tasks], deadline)
        *parts, last = received[0]
        link = await _result(last)
        self._chain.add(link, parts)
        self._published = version
        return PublishedWeights(link.manifest, tuple(self._chain.references), tuple(self._chain.links))

    async def broadcast(self, manifest: WeightManifest, group: NcclGroup) -> None:
        """Send the version published last to the engines of `group`, which receive it meanwhile.

        Raises `TransferError` (the group stays alive) when they did not.
        """
        calls = [rank.broadcast.remote(manifest, group) for rank in self._started()]
        await self._collect("broadcast", calls, self._deadline(CONNECT_DEADLINE_S + 2 * group.deadline_s))

    async def endpoint(self) -> tuple[str, int]:
        """Address and a free port of the first rank's node."""
        calls = [self._started()[0].rendezvous.remote()]
        address: tuple[str, int] = (await self._collect("rendezvous", calls, self._deadline(CONNECT_DEADLINE_S)))[0]
        return address

    async def save(self, directory: Path) -> None:
        """Write the resumable state into a directory; it is synced to disk, and all here, when this returns.

        Raises `CheckpointNotWritten` where the disk does not take it, or where the driver does not see what a rank
        wrote: the ranks stay alive.
        """
        calls = [rank.save.remote(str(directory)) for rank in self._started()]
        parts = await self._collect("save", calls, self._deadline(self.spec.step_timeout_s))
        await until_visible(directory, parts)

    async def export(self, directory: Path) -> None:
        """Write a Hugging Face checkpoint (safetensors, config, tokenizer) that transformers and vLLM load."""
        calls = [rank.export.remote(str(directory)) for rank in self._started()]
        await self._collect("export", calls, self._deadline(self.spec.step_timeout_s))

    def kill(self) -> None:
        """End all ranks at once; harmless when there are none."""
        import ray

        for rank in self._ranks:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(rank)
        self._ranks = []

    def _started(self) -> list[Any]:
        if not self._ranks:
            raise LearnerError("the learner group is not running; call start")
        return self._ranks

    def _deadline(self, seconds: float) -> float:
        return time.monotonic() + seconds

    @staticmethod
    async def _receive(stream: Any) -> list[Any]:
        refs = [ref async for ref in stream]
        if refs:
            # A generator that fails yields its error as the last reference.
            await _result(refs[-1])
        return refs

    async def _collect(self, phase: str, refs: Sequence[Any], deadline: float) -> list[Any]:
        return await self._settle(phase, [asyncio.ensure_future(_result(ref)) for ref in refs], deadline)

    async def _settle(self, phase: str, tasks: Sequence[asyncio.Future[Any]], deadline: float) -> list[Any]:
        """Results of one call per rank; on a failure or at the deadline, kill the generation and say who and what."""
        started = time.monotonic()
        await asyncio.wait(tasks, timeout=deadline - started, return_when=asyncio.FIRST_EXCEPTION)
        failed = [task for task in tasks if task.done() and task.exception()]
        if not failed and all(task.done() for task in tasks):
            return [task.result() for task in tasks]
        if failed:
            await asyncio.wait(tasks, timeout=SETTLE_S)
        errors = {rank: task.exception() for rank, task in enumerate(tasks) if task.done() and task.exception()}
        late = [rank for rank, task in enumerate(tasks) if not task.done()]
        for task in tasks:
            task.cancel()
        if not late and len(errors) == len(tasks):
            refused = [_cause(error) for error in errors.values()]
            if all(isinstance(cause, Refused) for cause in refused):
                raise refused[0]
        if errors and not late and all(is_store_full(error) for error in errors.values() if error):
            raise await store_full(f"learner, phase {phase}", self._ranks[0])
        if errors and not late and all(isinstance(_cause(error), TransferError) for error in errors.values()):
            raise _cause(next(iter(errors.values())))
        self.kill()
        waited = time.monotonic() - started
        raise LearnerError(_describe(phase, self.generation, errors, late, waited)) from _worst(errors)


def _on_living_nodes(placement_group: Any) -> bool:
    import ray

    table = ray.util.placement_group_table(placement_group)
    living = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return table["state"] == "CREATED" and living.issuperset(table["bundles_to_node_id"].values())


async def _result(ref: Any) -> Any:
    return await ref


def _cause(error: BaseException | None) -> BaseException:
    """The exception that a rank raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error or RuntimeError("unknown")


def _is_death(error: BaseException | None) -> bool:
    """Whether Ray lost the rank, or killed it for the memory of its node, before the call returned or raised."""
    from ray.exceptions import RayError, RayTaskError

    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def _worst(errors: dict[int, BaseException | None]) -> BaseException | None:
    """The death of a rank before the echo of its peers."""
    dead = [error for error in errors.values() if _is_death(error)]
    return next(iter(dead or errors.values()), None)


def _describe(
    phase: str, generation: int, errors: dict[int, BaseException | None], late: list[int], waited: float
) -> str:
    from ray.exceptions import RayActorError

    parts = []
    for rank, error in errors.items():
        if isinstance(error, RayActorError):
            parts.append(f"rank {rank} died")
        else:
            cause = _cause(error)
            first_line = (str(cause).strip().splitlines() or [""])[0]
            verb = "died of" if _is_death(error) else "raised"
            parts.append(f"rank {rank} {verb} {type(cause).__name__}: {first_line}")
    if late:
        parts.append(f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late))} not done after {waited:.0f} s")
    return f"learner generation {generation}, phase {phase}: {'; '.join(parts)}; all ranks were killed"
