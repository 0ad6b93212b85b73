"""How a policy version travels: senders in the learner, a chain of links in the driver, receivers in the actors.

    Sender.send --parts, then a Link--> object store --refs--> WeightChain --links, refs--> Receiver.receive --> shards

| transport    | parts of a version                                                                  |
|--------------|-------------------------------------------------------------------------------------|
| object_store | its shards                                                                          |
| delta        | what changed since the version before; its shards every `anchor_every` versions     |
| nccl         | its shards, for actors that miss the broadcast (`rollout.nccl_transfer`)            |

Invariants, for every transport: a receiver returns all bytes of a version, each shard with the checksum of its
manifest, or raises `WeightError`; it can go from any version it holds, or from none, to the newest one, whichever it
missed; what it returned before stays loaded whatever happens later. Importable without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar

import numpy as np

from rollout.nccl_transfer import TensorDigest
from rollout.weights import (
    MAX_SHARD_BYTES,
    PackedShard,
    WeightError,
    WeightManifest,
    iterate_shards,
    make_manifest,
    verify_shards,
)

if TYPE_CHECKING:
    from torch import Tensor

Transport = Literal["object_store", "delta", "nccl"]
Reference = TypeVar("Reference")
Fetch = Callable[[int, int], Sequence[np.ndarray]]
"""(first, count) -> these parts, in the order of the chain; blocks, and raises when its deadline passes."""

ANCHOR_EVERY = 16
_HEADER = 8
"""Bytes before the changes of a part: their number, int64, or -1 where the whole shard follows."""
_STRIDE = 65_535
"""Every so many 16-bit words one is sent although it did not change, so that gaps between words fit 16 bits."""


@dataclass(frozen=True, slots=True)
class Link:
    """One version in a chain; it has one part per shard."""

    manifest: WeightManifest
    """Of the whole version: what a receiver must end up with."""
    base_version: int | None
    """The version that the parts change; None for an anchor, whose parts are the shards."""
    digest: int | None = None
    """`rollout.nccl_transfer.TensorDigest` of the version, where it is broadcast as well."""

    @property
    def num_parts(self) -> int:
        """Parts that this link adds to the chain."""
        return len(self.manifest.shard_bytes)


class Sender(Protocol):
    """The learner's end."""

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[np.ndarray | Link]:
        """Yield the parts of a version, the link last; a part is valid until the next one is asked for."""
        ...


class Receiver(Protocol):
    """The rollout actor's end."""

    def receive(self, links: Sequence[Link], fetch: Fetch) -> list[np.ndarray]:
        """The checked shards of the last link's version, valid until the next call; raises `WeightError`."""
        ...


def make_sender(
    transport: Transport, *, max_shard_bytes: int = MAX_SHARD_BYTES, anchor_every: int = ANCHOR_EVERY
) -> Sender:
    """The sender of a transport."""
    if transport == "delta":
        return DeltaSender(max_shard_bytes=max_shard_bytes, anchor_every=anchor_every)
    return FullSender(max_shard_bytes=max_shard_bytes, digest=transport == "nccl")


def make_receiver(transport: Transport) -> Receiver:
    """The receiver of a transport."""
    return DeltaReceiver() if transport == "delta" else FullReceiver()


class WeightChain(Generic[Reference]):
    """The driver's end: the newest anchor and every link after it, with references to their parts.

    It is all that a receiver can need, and all that keeps the parts alive.
    """

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.references: list[Reference] = []

    def add(self, link: Link, references: Sequence[Reference]) -> None:
        """Append a version; an anchor starts over. Raises `WeightError` if it does not continue the last one."""
        if len(references) != link.num_parts:
            raise WeightError(f"version {link.manifest.version}: {len(references)} parts, need {link.num_parts}")
        if link.base_version is None:
            self.links, self.references = [], []
        elif not self.links or self.links[-1].manifest.version != link.base_version:
            held = self.links[-1].manifest.version if self.links else None
            raise WeightError(
                f"version {link.manifest.version} changes version {link.base_version}, but the newest one is {held}"
            )
        self.links.append(link)
        self.references += references


class FullSender:
    """Every version is an anchor; with `digest` its link has the digest of the tensors where they lie."""

    def __init__(self, *, max_shard_bytes: int = MAX_SHARD_BYTES, digest: bool = False) -> None:
        # Two: one is hashed and put away while the other is filled.
        self._buffers = [np.empty(max_shard_bytes, np.uint8) for _ in range(2)]
        self._digest = digest

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[np.ndarray | Link]:
        """Yield the shards, the link last."""
        packed, digest = [], TensorDigest() if self._digest else None
        tensors = tensors if digest is None else digest.watch(tensors)
        for shard in iterate_shards(tensors, max_shard_bytes=len(self._buffers[0]), buffers=self._buffers):
            yield shard.data
            packed.append(shard)
        yield Link(make_manifest(version, packed), None, None if digest is None else digest.value())


class FullReceiver:
    """Checks the shards where they lie in the object store."""

    def receive(self, links: Sequence[Link], fetch: Fetch) -> list[np.ndarray]:
        """The shards of the last link, which must be an anchor."""
        if links[-1].base_version is not None:
            raise WeightError(f"version {links[-1].manifest.version} is a delta: set the same transport on both ends")
        first = sum(link.num_parts for link in links[:-1])
        shards = list(fetch(first, links[-1].num_parts))
        verify_shards(links[-1].manifest, shards)
        return shards


class DeltaSender:
    """Sends the 16-bit words that changed since the last version; keeps one copy of the weights to compare with."""

    def __init__(self, *, max_shard_bytes: int = MAX_SHARD_BYTES, anchor_every: int = ANCHOR_EVERY) -> None:
        self._buffers = [np.empty(max_shard_bytes, np.uint8) for _ in range(2)]
        self._anchor_every = anchor_every
        self._last: list[np.ndarray] = []
        self._manifest: WeightManifest | None = None
        self._since_anchor = 0

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[np.ndarray | Link]:
        """Yield one part per shard, the link last; an anchor at first, when due, and after an unfinished version."""
        base, self._manifest = self._manifest, None
        anchor = base is None or self._since_anchor + 1 >= self._anchor_every
        packed = []
        for number, shard in enumerate(self._shards(tensors)):
            if base is not None and not anchor:
                _same_layout(base, number, shard)
            if number == len(self._last):
                self._last.append(shard.data.copy())
                yield self._last[number]
            elif anchor:
                self._last[number] = _replace(self._last[number], shard.data)
                yield self._last[number]
            else:
                yield encode_changes(self._last[number], shard.data)
                np.copyto(self._last[number], shard.data)
            packed.append(shard)
        del self._last[len(packed) :]
        manifest = make_manifest(version, packed)
        if base is not None and not anchor and manifest.entries != base.entries:
            raise WeightError(f"version {version}: fewer tensors than in version {base.version}; the next is an anchor")
        self._manifest = manifest
        self._since_anchor = 0 if anchor else self._since_anchor + 1
        yield Link(manifest, None if anchor or base is None else base.version)

    def _shards(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[PackedShard]:
        return iterate_shards(tensors, max_shard_bytes=len(self._buffers[0]), buffers=self._buffers)


def _same_layout(base: WeightManifest, number: int, shard: PackedShard) -> None:
    entries = tuple(entry for entry in base.entries if entry.shard == number)
    if entries != shard.entries:
        raise WeightError(
            f"shard {number}: other tensors than in version {base.version}; the next version is an anchor"
        )


def _replace(held: np.ndarray, data: np.ndarray) -> np.ndarray:
    """`held` with the bytes of `data`, in the same memory if they fit."""
    if len(held) != len(data):
        return data.copy()
    np.copyto(held, data)
    return held


class DeltaReceiver:
    """Holds one copy of the weights and applies the links it missed, all of them if it holds none."""

    def __init__(self) -> None:
        self._shards: list[np.ndarray] = []
        self._version: int | None = None

    def receive(self, links: Sequence[Link], fetch: Fetch) -> list[np.ndarray]:
        """The shards of the last link's version.

        A copy that does not check out is thrown away and rebuilt from the anchor, once.
        """
        versions = [link.manifest.version for link in links]
        if self._version in versions:
            try:
                return self._apply(links, versions.index(self._version) + 1, fetch)
            except WeightError:
                self._version = None
        return self._apply(links, 0, fetch)

    def _apply(self, links: Sequence[Link], start: int, fetch: Fetch) -> list[np.ndarray]:
        """Apply links[start:] and check the result; while bytes are half-written this object holds no version."""
        held, self._version = self._version, None
        first = sum(link.num_parts for link in links[:start])
        for link in links[start:]:
            parts = fetch(first, link.num_parts)
            first += link.num_parts
            if link.base_version is None:
                self._take(parts)
            else:
                self._change(link, parts, held)
            held = link.manifest.version
        verify_shards(links[-1].manifest, self._shards)
        self._version = held
        return self._shards

    def _take(self, parts: Sequence[np.ndarray]) -> None:
        """Copy an anchor, into the memory of the copy that it replaces."""
        held = self._shards[: len(parts)]
        self._shards = [_replace(old, part) for old, part in zip(held, parts, strict=False)]
        self._shards += [part.copy() for part in parts[len(held) :]]

    def _change(self, link: Link, parts: Sequence[np.ndarray], held: int | None) -> None:
        if link.base_version != held or len(parts) != len(self._shards):
            raise WeightError(f"version {link.manifest.version} changes version {link.base_version}, held is {held}")
        for number, (shard, part) in enumerate(zip(self._shards, parts, strict=True)):
            apply_changes(shard, part, f"version {link.manifest.version}, shard {number}")


def encode_changes(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The 16-bit words of `new` that differ from `old` (both [n] uint8), as bytes: gaps between them, then values.

    Lossless; 4 bytes per changed word. If that is no gain the whole of `new` is sent.
    """
    old_words, new_words = _words(old), _words(new)
    changed = new_words != old_words
    changed[::_STRIDE] = True
    where = np.flatnonzero(changed)
    if 4 * len(where) + _HEADER >= len(new):
        return np.concatenate([_header(-1), new])
    tail = new[2 * len(new_words) :]  # an odd last byte is always sent
    gaps = np.diff(where, prepend=0).astype(np.uint16)
    parts = [_header(len(where)), gaps.view(np.uint8), new_words[where].view(np.uint8), tail]
    return np.concatenate(parts)


def apply_changes(shard: np.ndarray, part: np.ndarray, name: str) -> None:
    """Turn `shard` ([n] uint8, writable) into the version that `part` was encoded for; checks sizes, not contents."""
    if len(part) < _HEADER:
        raise WeightError(f"{name}: a part of {len(part)} bytes is torn")
    count, body = int(part[:_HEADER].view(np.int64)[0]), part[_HEADER:]
    words = _words(shard)
    if count < 0:
        if len(body) != len(shard):
            raise WeightError(f"{name}: a whole part of {len(body)} bytes, need {len(shard)}")
        np.copyto(shard, body)
        return
    if len(body) != 4 * count + len(shard) % 2:
        raise WeightError(f"{name}: {len(body)} bytes cannot hold {count} changes")
    where = np.cumsum(body[: 2 * count].view(np.uint16), dtype=np.int64)
    if count and where[-1] >= len(words):
        raise WeightError(f"{name}: a change at word {where[-1]}, the shard has {len(words)}")
    words[where] = body[2 * count : 4 * count].view(np.uint16)
    shard[2 * len(words) :] = body[4 * count :]


def _header(count: int) -> np.ndarray:
    return np.array([count], np.int64).view(np.uint8)


def _words(data: np.ndarray) -> np.ndarray:
    """The 16-bit words of a byte array, without an odd last byte."""
    return data[: len(data) // 2 * 2].view(np.uint16)
