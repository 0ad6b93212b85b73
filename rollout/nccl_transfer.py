"""Weights over NCCL, from the learner's first rank straight into the workers of every rollout engine (vLLM's own path).

    NcclSender (learner rank 0) --update info--> EngineClient --one call per actor--> receive_policy (engine thread)
            \\---------------- NCCL broadcast of packed buffers -----------------------------------^

Only for GPUs, and only with vLLM (tested: 0.32). The group is fixed when it is connected: rank 0 is the learner, the
workers of actor i follow at 1 + i * tensor_parallel_size. An actor that was restarted is not in it: close the sender,
serve the newest version from the object store, connect again.

Invariants: an engine runs no step between the first and the last byte of a version (all three phases of vLLM's update
are one command of the engine thread); its version number changes in that same command. There is no checksum: an
engine whose transfer failed holds a torn version and must be ended, never stepped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rollout.weights import WeightError, WeightManifest

if TYPE_CHECKING:
    from torch import Tensor

BACKEND = "nccl"
"""`backend` of the `weight_transfer_config` that an engine on this transport starts with."""


@dataclass(frozen=True, slots=True)
class NcclPlan:
    """The transfer group."""

    master_address: str
    """Of the learner's first rank."""
    master_port: int
    num_engines: int
    tensor_parallel_size: int
    """Workers per engine."""
    deadline_s: float
    """Of one version, and of connecting."""

    @property
    def world_size(self) -> int:
        """The learner and every worker."""
        return 1 + self.num_engines * self.tensor_parallel_size

    def rank_offset(self, engine: int) -> int:
        """Rank of the first worker of an engine."""
        return 1 + engine * self.tensor_parallel_size


class EngineCore(Protocol):
    """vLLM's `LLMEngine`, as far as it is needed here."""

    def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a method on every worker."""
        ...


def connect_workers(core: EngineCore, init_info: dict[str, Any]) -> None:
    """Join the transfer group; runs on the engine thread and returns when all ranks are there."""
    core.collective_rpc("init_weight_transfer_engine", args=(init_info,))


def receive_policy(core: EngineCore, update_info: dict[str, Any]) -> None:
    """Receive one version in place; runs on the engine thread as one command, between two steps."""
    core.collective_rpc("start_weight_update")
    core.collective_rpc("update_weights", args=(update_info,))
    core.collective_rpc("finish_weight_update")


Call = Callable[[int, str, dict[str, Any]], Any]
"""(engine, "connect" or "receive", payload) -> a reference to the running call on that rollout actor."""
Wait = Callable[[Sequence[Any], float], Any]
"""(references, seconds) -> results; raises when one failed or the time is over (`ray.get` with a timeout)."""


class EngineClient:
    """vLLM's weight-sync client over our actors: the trainer engine calls it from a side thread.

    vLLM's own Ray client gives all handles one rank offset, right for the replicas of one data-parallel engine only.
    """

    def __init__(self, plan: NcclPlan, call: Call, wait: Wait) -> None:
        self._plan, self._call, self._wait = plan, call, wait
        self.version = 0
        """Of the transfer in progress; goes with the payload, so that an engine takes bytes and number at once."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every engine joins with a rank of its own."""
        self._all("connect", lambda engine: {**init_info, "rank_offset": self._plan.rank_offset(engine)})

    def start_weight_update(self) -> None:
        """Nothing: an engine starts, receives and finishes in one command."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Every engine receives while the learner broadcasts."""
        self._all("receive", lambda _: {"version": self.version, "update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing, see `start_weight_update`."""

    def _all(self, phase: str, payload: Callable[[int], dict[str, Any]]) -> None:
        calls = [self._call(engine, phase, payload(engine)) for engine in range(self._plan.num_engines)]
        self._wait(calls, self._plan.deadline_s)


class PolicySource:
    """vLLM's weight source over the learner's tensors; names and shapes come from a version already published."""

    def __init__(self, manifest: WeightManifest, tensors: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        self._manifest, self._tensors = manifest, tensors

    def metadata(self) -> list[Any]:
        """Name, dtype and shape of every tensor, without gathering any."""
        import torch
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(entry.name, getattr(torch, entry.dtype), entry.shape) for entry in self._manifest.entries]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._tensors())


class NcclSender:
    """The learner's first rank; other ranks iterate the same tensors to stay in the gathers (see `Trainer.weights`)."""

    def __init__(self, plan: NcclPlan, source: PolicySource, call: Call, wait: Wait) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        self._client = EngineClient(plan, call, wait)
        init_info = NCCLTrainerInitInfo(plan.master_address, plan.master_port, plan.world_size, rank=0)
        self._engine = NCCLTrainerWeightTransferEngine.trainer_init(init_info, client=self._client, source=source)
        self._broken = False

    def send(self, version: int) -> float:
        """Bring every engine to `version`; returns the seconds, in which none of them decoded.

        Raises what the transfer raised; the group is unusable afterwards and every engine in it torn.
        """
        if self._broken:
            raise WeightError(f"version {version}: an earlier transfer failed; connect a new group")
        started = time.monotonic()
        self._client.version = version
        self._broken = True
        self._engine.send_weights()
        self._broken = False
        return time.monotonic() - started

    def close(self) -> None:
        """Leave the group."""
        self._engine.shutdown()
