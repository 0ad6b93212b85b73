"""Weights over NCCL: the learner's first rank broadcasts a version straight into the workers of rollout engines.

    driver --broadcast--> learner ranks == packed NCCL broadcast (vLLM's trainer engine) ==> SoftWorker.receive_policy
    driver --receive_weights--> every actor of the group --one command of the engine thread--------^

The object store has each version too, with its manifest: whoever is not in the group (late, restarted, its transfer
failed) takes it from there. A group is the actors that served when it was made; when others serve, the next broadcast
makes a new one.

Invariants: an engine runs no step between the first and the last byte of a version; it steps again only if the digest
of what it received is the one that the learner computed when it packed the version. An engine whose transfer failed
holds a torn version: its thread ends and the actor is replaced. A broadcast lasts no longer than the group's deadline.
Joining a group has none in this process once all ranks have met: if one dies while NCCL connects them, the others wait
until the driver's deadline for the whole call ends their processes. Importable without torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from rollout.weights import WeightManifest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BACKEND = "softgrpo_nccl"
"""`backend` of the `weight_transfer_config` that an engine on this transport starts with."""
CONNECT_DEADLINE_S = 300.0
"""For all ranks of a group to meet: what vLLM waits for a rank that never comes."""
DIGEST_CHUNK = 2**20
"""Elements that are multiplied at a time: the product takes 8 bytes each."""


class TransferError(RuntimeError):
    """A broadcast that did not happen or was cut off; the sender's weights are untouched."""


@dataclass(frozen=True, slots=True)
class NcclGroup:
    """A transfer group: rank 0 is the learner, the workers of engine i follow at 1 + i * tensor_parallel_size."""

    master_address: str
    """Of the learner's first rank."""
    master_port: int
    num_engines: int
    tensor_parallel_size: int
    """Workers per engine."""
    deadline_s: float
    """Of one broadcast."""

    @property
    def world_size(self) -> int:
        """The learner and every worker."""
        return 1 + self.num_engines * self.tensor_parallel_size

    def rank_offset(self, engine: int) -> int:
        """Rank of the first worker of an engine."""
        return 1 + engine * self.tensor_parallel_size


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What one engine is told about one version."""

    manifest: WeightManifest
    digest: int
    """`TensorDigest` of the version."""
    group: NcclGroup
    engine: int
    """Number in the group, from 0."""


class TensorDigest:
    """63 bits over tensors in order, computed on the device where they lie; a sum of elements times fixed odd factors.

    For bytes that never come to the host, where XXH3 reads them: finds torn, swapped and missing data, not an enemy.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Hand the tensors on and count them in."""
        for name, tensor in tensors:
            self._sums.append(self._sum(tensor))
            yield name, tensor

    def value(self) -> int:
        """The digest; waits for the device."""
        import torch

        total = 0
        for number in torch.stack(self._sums).tolist() if self._sums else ():
            total = (total * 0x9E3779B97F4A7C15 + number) % 2**64
        return total >> 1

    def _sum(self, tensor: Tensor) -> Tensor:
        import torch

        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        data = tensor.detach().reshape(-1).view(integer)
        factors = _factors(DIGEST_CHUNK, data.device)
        total = torch.full((), len(data), dtype=torch.int64, device=data.device)
        for chunk in data.split(DIGEST_CHUNK):
            total = total * 0x5851F42D4C957F2D + (chunk.to(torch.int64) * factors[: len(chunk)]).sum()
        return total


@cache
def _factors(count: int, device: torch.device) -> Tensor:
    """One odd number per position of a chunk ([count] int64), the same on every device."""
    import torch

    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x369DEA0F31A53F85
    factors = (mixed ^ (mixed >> 32)) | 1
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams will read it
    return factors


class Communicator(Protocol):
    """vLLM's `PyNcclCommunicator`, as far as it is needed here."""

    disabled: bool

    def destroy(self) -> None:
        """Abort: whoever waits in it returns."""
        ...


def check_joined(communicator: Communicator) -> None:
    """Raise `TransferError` where joining gave a communicator that transfers nothing, as vLLM's does without NCCL."""
    if communicator.disabled:
        raise TransferError(
            "NCCL is not available here: vLLM could not load libnccl, or VLLM_DISABLE_PYNCCL is set; repair that, or "
            "set pipeline.transport: object_store"
        )


@contextmanager
def deadline(communicator: Communicator, seconds: float, what: str) -> Iterator[None]:
    """Abort the communicator when `seconds` have passed; raises `TransferError` if that happened inside.

    NCCL itself waits for a lost peer without end, and after an abort vLLM's calls return without doing anything.
    """
    timer = threading.Timer(seconds, communicator.destroy)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if communicator.disabled:
            raise TransferError(f"{what}: not done after {seconds:.0f} s, aborted") from error
        raise
    finally:
        timer.cancel()
    if communicator.disabled:
        raise TransferError(f"{what}: not done after {seconds:.0f} s, aborted")


class DriverCalls:
    """The engines' side as vLLM's trainer engine would call it; here the driver has called them already."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Nothing, the engines join when they are told of a new group."""

    def start_weight_update(self) -> None:
        """Nothing, see the class."""

    def update_weights(self, update_info: Any) -> None:
        """Nothing, see the class."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing, see the class."""


class PolicySource:
    """vLLM's weight source over one version: names and shapes of its manifest, the learner's tensors."""

    def __init__(self) -> None:
        self.manifest = WeightManifest(0, (), ())
        self.weights: Iterator[tuple[str, Tensor]] = iter(())

    def metadata(self) -> list[Any]:
        """Name, dtype and shape of every tensor, without gathering any."""
        import torch
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(entry.name, getattr(torch, entry.dtype), entry.shape) for entry in self.manifest.entries]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.weights


class NcclSender:
    """The learner's first rank in one group."""

    def __init__(self, group: NcclGroup) -> None:
        """Join; returns when all ranks are there, or raises `TransferError`."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        self.group = group
        self._source = PolicySource()
        init_info = NCCLTrainerInitInfo(group.master_address, group.master_port, group.world_size, rank=0)
        try:
            self._engine = NCCLTrainerWeightTransferEngine.trainer_init(
                init_info, client=DriverCalls(), source=self._source
            )
        except RuntimeError as error:
            raise TransferError(f"no NCCL group of {group.world_size} ranks: {error}") from error
        check_joined(self._engine.model_update_group)

    def send(self, manifest: WeightManifest, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Broadcast the version that `weights` yields. After an exception the group is of no more use: `close` it."""
        self._source.manifest, self._source.weights = manifest, weights
        with deadline(self._engine.model_update_group, self.group.deadline_s, f"broadcast of {manifest.version}"):
            self._engine.send_weights()

    def close(self) -> None:
        """Leave the group."""
        self._engine.shutdown()
