"""Weight bundles: one policy version as flat uint8 shards plus one manifest.

The manifest travels last: a reader that holds it can have every byte of the version or none (checksums).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 256 * 2**20


class WeightError(RuntimeError):
    """A bundle that is torn, of another model or of another version; the message names the shard or tensor."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor of the checkpoint lies."""

    name: str
    dtype: str
    """torch dtype name without the prefix, e.g. `bfloat16`"""
    shape: tuple[int, ...]
    shard: int
    offset: int
    """bytes from the start of the shard"""


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """Everything a reader needs to check and cut the shards of one version."""

    version: int
    entries: tuple[TensorEntry, ...]
    shard_bytes: tuple[int, ...]
    checksums: tuple[int, ...]
    """one per shard"""


def pack_weights(
    version: int, tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[WeightManifest, list[np.ndarray]]:
    """Copy named tensors (Hugging Face names, any device) into flat uint8 shards; a tensor never spans two shards."""
    raise NotImplementedError


def iterate_weights(manifest: WeightManifest, shards: Sequence[np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    """Named CPU tensors as views of the shards. Raises `WeightError` if a length or checksum differs."""
    raise NotImplementedError
