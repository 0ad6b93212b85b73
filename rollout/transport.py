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
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar

import numpy as np

from rollout.nccl_transfer import TensorDigest
from rollout.weights import MAX_SHARD_BYTES, Shard, WeightError, WeightManifest, split_into_shards, verify_shards

if TYPE_CHECKING:
    from torch import Tensor

Transport = Literal["object_store", "delta", "nccl"]
Reference = TypeVar("Reference")
Part = Sequence[np.ndarray]
"""What one object of the store holds: a shard, or what changed in it, with one uint8 array per tensor."""
Fetch = Callable[[int, int], Sequence[Part]]
"""(first, count) -> these parts, in the order of the chain; blocks, and raises when its deadline passes."""

ANCHOR_EVERY = 16
_HEADER = 8
"""Bytes before the changes of a tensor: their number, int64, or -1 where the whole tensor follows."""
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
        return self.manifest.num_shards


class Sender(Protocol):
    """The learner's end."""

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Part | Link]:
        """Yield the parts of a version, the link last; a part is valid until the next one is asked for.

        Tensors must not change meanwhile. Sent again, a version is an anchor: somebody could not get it.
        """
        ...


class Receiver(Protocol):
    """The rollout actor's end."""

    def receive(self, links: Sequence[Link], fetch: Fetch) -> Sequence[Shard]:
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
        self._max_shard_bytes = max_shard_bytes
        self._digest = digest

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Part | Link]:
        """Yield the shards, the link last."""
        digest = TensorDigest() if self._digest else None
        watched = tensors if digest is None else digest.watch(tensors)
        manifest = yield from split_into_shards(version, watched, max_shard_bytes=self._max_shard_bytes)
        yield Link(manifest, None, None if digest is None else digest.value())


class FullReceiver:
    """Checks the shards where they lie in the object store."""

    def receive(self, links: Sequence[Link], fetch: Fetch) -> Sequence[Shard]:
        """The shards of the last link, which must be an anchor."""
        if links[-1].base_version is not None:
            raise WeightError(f"version {links[-1].manifest.version} is a delta: set the same transport on both ends")
        first = sum(link.num_parts for link in links[:-1])
        shards = fetch(first, links[-1].num_parts)
        verify_shards(links[-1].manifest, shards)
        return shards


class DeltaSender:
    """Sends the 16-bit words that changed since the last version; keeps one copy of the weights to compare with."""

    def __init__(self, *, max_shard_bytes: int = MAX_SHARD_BYTES, anchor_every: int = ANCHOR_EVERY) -> None:
        self._max_shard_bytes = max_shard_bytes
        self._anchor_every = anchor_every
        self._last: list[Shard] = []
        self._manifest: WeightManifest | None = None
        self._since_anchor = 0

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Part | Link]:
        """Yield one part per shard, the link last.

        An anchor at first, when due, after an unfinished version, and where the version was sent before.
        """
        base, self._manifest = self._manifest, None
        if base is not None and (base.version == version or self._since_anchor + 1 >= self._anchor_every):
            base = None
        encode = self._whole if base is None else self._changes
        manifest = yield from split_into_shards(version, tensors, max_shard_bytes=self._max_shard_bytes, encode=encode)
        del self._last[manifest.num_shards :]
        if base is not None and manifest.entries != base.entries:
            raise WeightError(f"version {version}: other tensors than in version {base.version}; the next is an anchor")
        self._manifest = manifest
        self._since_anchor = 0 if base is None else self._since_anchor + 1
        yield Link(manifest, None if base is None else base.version)

    def _whole(self, number: int, shard: Shard) -> Part:
        self._last[number : number + 1] = [_copied(shard, self._held(number))]
        return shard

    def _changes(self, number: int, shard: Shard) -> Part:
        last = self._held(number)
        if _sizes(last) != _sizes(shard):
            raise WeightError(f"shard {number}: other tensors than in the version before; the next is an anchor")
        part = [encode_changes(old, new) for old, new in zip(last, shard, strict=True)]
        _copied(shard, last)
        return part

    def _held(self, number: int) -> Shard:
        return self._last[number] if number < len(self._last) else ()


def _sizes(shard: Shard) -> list[int]:
    return [len(data) for data in shard]


def _copied(shard: Shard, memory: Shard) -> Shard:
    """A copy of `shard`, in the memory of another one if that has the same sizes."""
    if _sizes(shard) != _sizes(memory):
        return [data.copy() for data in shard]
    for old, new in zip(memory, shard, strict=True):
        np.copyto(old, new)
    return memory


class DeltaReceiver:
    """Holds one copy of the weights and applies the links it missed, all of them if it holds none."""

    def __init__(self) -> None:
        self._shards: list[Shard] = []
        self._version: int | None = None

    def receive(self, links: Sequence[Link], fetch: Fetch) -> Sequence[Shard]:
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

    def _apply(self, links: Sequence[Link], start: int, fetch: Fetch) -> Sequence[Shard]:
        """Apply links[start:] and check the result; while bytes are half-written this object holds no version."""
        held, self._version = self._version, None
        first = sum(link.num_parts for link in links[:start])
        for link in links[start:]:
            parts = fetch(first, link.num_parts)
            first += link.num_parts
            if link.base_version is None:
                memory = self._shards[: len(parts)]
                self._shards = [_copied(part, old) for part, old in zip_longest(parts, memory, fillvalue=())]
            else:
                self._change(link, parts, held)
            held = link.manifest.version
        verify_shards(links[-1].manifest, self._shards)
        self._version = held
        return self._shards

    def _change(self, link: Link, parts: Sequence[Part], held: int | None) -> None:
        manifest = link.manifest
        if link.base_version != held:
            raise WeightError(f"version {manifest.version} changes version {link.base_version}, held is {held}")
        arrays, changes = list(chain.from_iterable(self._shards)), list(chain.from_iterable(parts))
        if not len(arrays) == len(changes) == len(manifest.entries):
            raise WeightError(
                f"version {manifest.version}: changes of {len(changes)} tensors, it has {len(manifest.entries)}, "
                f"held are {len(arrays)}"
            )
        for entry, data, change in zip(manifest.entries, arrays, changes, strict=True):
            apply_changes(data, change, f"version {manifest.version}, tensor {entry.name}")


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
    return np.concatenate([_header(len(where)), gaps.view(np.uint8), new_words[where].view(np.uint8), tail])


def apply_changes(data: np.ndarray, change: np.ndarray, name: str) -> None:
    """Turn `data` ([n] uint8, writable) into what `change` was encoded for; checks sizes, not contents."""
    if len(change) < _HEADER:
        raise WeightError(f"{name}: a change of {len(change)} bytes is torn")
    count, body = int(change[:_HEADER].view(np.int64)[0]), change[_HEADER:]
    words = _words(data)
    if count < 0:
        if len(body) != len(data):
            raise WeightError(f"{name}: {len(body)} bytes instead of {len(data)}")
        np.copyto(data, body)
        return
    if len(body) != 4 * count + len(data) % 2:
        raise WeightError(f"{name}: {len(body)} bytes cannot hold {count} changes")
    where = np.cumsum(body[: 2 * count].view(np.uint16), dtype=np.int64)
    if count and where[-1] >= len(words):
        raise WeightError(f"{name}: a change at word {where[-1]}, there are {len(words)}")
    words[where] = body[2 * count : 4 * count].view(np.uint16)
    data[2 * len(words) :] = body[4 * count :]


def _header(count: int) -> np.ndarray:
    return np.array([count], np.int64).view(np.uint8)


def _words(data: np.ndarray) -> np.ndarray:
    """The 16-bit words of a byte array, without an odd last byte."""
    return data[: len(data) // 2 * 2].view(np.uint16)
