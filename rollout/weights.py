"""Weight bundles: one policy version as shards of flat uint8 arrays plus one manifest.

    tensors --split_into_shards--> shards, one object of the store each; then the manifest
    shards + manifest --verify_shards--> every byte of the version is there --iterate_weights--> tensors, as views

A shard has one array per tensor: Ray lays them side by side in one object, straight from where the tensors lie. So a
host tensor is copied once on its way into the store and not at all on its way out. The manifest travels last: a reader
that holds it can have every byte of the version or none (checksums). It passes through the driver, so this module is
importable without torch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 256 * 2**20
VERSION_VARIABLE = "SOFTGRPO_POLICY_VERSION"
"""Environment variable in which a process keeps the policy version that it works with, for its log lines."""
Shard = Sequence[np.ndarray]
"""The bytes of one or more tensors, each [n] uint8, in the order of the manifest."""


class WeightError(RuntimeError):
    """A bundle that is torn, of another model or of another version; the message names the shard or tensor."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What one array of a shard is."""

    name: str
    dtype: str
    """torch dtype name without the prefix, e.g. `bfloat16`"""
    shape: tuple[int, ...]
    num_bytes: int
    shard: int


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """Everything a reader needs to check the shards of one version and to cut tensors from them."""

    version: int
    entries: tuple[TensorEntry, ...]
    checksums: tuple[int, ...]
    """one per shard"""

    @property
    def num_shards(self) -> int:
        """Shards of the version; each has at least one tensor."""
        return len(self.checksums)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries)


def shard_checksum(shard: Shard) -> int:
    """XXH3 (64 bits) of all bytes: finds torn, stale and mixed data, not an enemy, at the speed of reading them.

    Without the interpreter lock and on one core: a rollout actor checks while it decodes, and needs its other cores.
    """
    digest = xxhash.xxh3_64()
    for data in shard:
        digest.update(data.data)
    return digest.intdigest()


def split_into_shards(
    version: int,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    encode: Callable[[int, Shard], Shard] = lambda number, shard: shard,
) -> Generator[Shard, None, WeightManifest]:
    """Yield named tensors (any device, consumed one by one) shard by shard, each `encode`d; returns the manifest.

    Arrays of host tensors are views: no tensor of a shard may change before the next shard is asked for. A tensor never
    spans two shards; one larger than `max_shard_bytes` gets a shard of its own. A shard is hashed, as it was before
    `encode`, in a thread while the caller puts it away.
    """
    entries: list[TensorEntry] = []
    checksums: list[int] = []
    with ThreadPoolExecutor(1, "shard-checksum") as hasher:
        for number, (shard_entries, shard) in enumerate(_grouped(tensors, max_shard_bytes)):
            hashing = hasher.submit(shard_checksum, shard)
            yield encode(number, shard)
            entries += shard_entries
            checksums.append(hashing.result())
    return WeightManifest(version, tuple(entries), tuple(checksums))


def _grouped(
    tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> Iterator[tuple[list[TensorEntry], list[np.ndarray]]]:
    number, used = 0, 0
    entries: list[TensorEntry] = []
    shard: list[np.ndarray] = []
    for name, tensor in tensors:
        if shard and used + tensor.nbytes > max_shard_bytes:
            yield entries, shard
            number, used, entries, shard = number + 1, 0, [], []
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), tensor.nbytes, number))
        shard.append(_host_bytes(tensor))
        used += tensor.nbytes
    if shard:
        yield entries, shard


def _host_bytes(tensor: Tensor) -> np.ndarray:
    """[n] uint8: a view of a contiguous host tensor, a copy of any other."""
    import torch

    data = tensor.detach()
    if data.device.type != "cpu":
        # Pinned for the speed of the copy; torch keeps such memory and gives it out again for the next shards.
        data = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda).copy_(data)
    return data.reshape(-1).view(torch.uint8).numpy()


def verify_shards(manifest: WeightManifest, shards: Sequence[Shard]) -> None:
    """Raise `WeightError` unless every byte of the version is there."""
    if len(shards) != manifest.num_shards:
        raise WeightError(f"version {manifest.version}: {len(shards)} shards, need {manifest.num_shards}")
    sizes: list[list[int]] = [[] for _ in shards]
    for entry in manifest.entries:
        sizes[entry.shard].append(entry.num_bytes)
    for number, (shard, need, checksum) in enumerate(zip(shards, sizes, manifest.checksums, strict=True)):
        where = f"version {manifest.version}, shard {number}"
        found = [data.nbytes for data in shard]
        if found != need:
            raise WeightError(f"{where}: {len(found)} tensors, {sum(found)} bytes, need {len(need)}, {sum(need)}")
        read = shard_checksum(shard)
        if read != checksum:
            raise WeightError(f"{where}: checksum {read:x}, need {checksum:x}")


def iterate_weights(
    manifest: WeightManifest, shards: Sequence[Shard], *, verify: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Named CPU tensors as views of the shards; do not write to them.

    Raises `WeightError` before the first tensor if a length or checksum differs; `verify=False` is for shards that
    `verify_shards` has seen.
    """
    if verify:
        verify_shards(manifest, shards)
    for entry, data in zip(manifest.entries, chain.from_iterable(shards), strict=True):
        yield entry.name, _view(manifest.version, entry, data)


def _view(version: int, entry: TensorEntry, data: np.ndarray) -> Tensor:
    import torch

    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightError(f"version {version}, tensor {entry.name}: unknown dtype {entry.dtype}")
    if math.prod(entry.shape) * dtype.itemsize != data.nbytes:
        raise WeightError(
            f"version {version}, tensor {entry.name}: {data.nbytes} bytes are no {entry.dtype} of shape {entry.shape}"
        )
    if data.nbytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    with warnings.catch_warnings():
        # Shards from the object store are read-only, and so is what readers do with them.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=dtype).view(entry.shape)
