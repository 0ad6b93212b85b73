"""Weight bundles: equal bytes back, without copies of our own, and every torn or mixed-up bundle refused."""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import weights
from rollout.transport import FullSender, Part
from rollout.weights import (
    MAX_SHARD_BYTES,
    WeightError,
    WeightManifest,
    iterate_weights,
    shard_checksum,
    split_into_shards,
    verify_shards,
)
from tests.rollout.stored import stored, stored_part

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn)
Named = list[tuple[str, torch.Tensor]]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def model(seed: int = 0, count: int = 7) -> Named:
    """Tensors of several dtypes and shapes; scalars, empty and transposed ones too."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (), (64,), (0, 4), (17, 9), (2, 3, 4), (1,)]
    tensors = []
    for index in range(count):
        tensor = torch.randn(shapes[index % 7], generator=generator).mul(20).to(DTYPES[index % 6])
        tensors.append((f"layer.{index}.weight", tensor.t() if tensor.dim() == 2 else tensor))
    return tensors


def bundle(version: int, tensors: Named, max_shard_bytes: int = MAX_SHARD_BYTES) -> tuple[WeightManifest, list[Part]]:
    parts, link = stored(FullSender(max_shard_bytes=max_shard_bytes), version, tensors)
    return link.manifest, parts


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 20), st.sampled_from([1, 64, 100, 1000, 2**20]), st.integers(0, 3))
def test_round_trip(count: int, max_shard_bytes: int, seed: int) -> None:
    wanted = model(seed, count)
    manifest, shards = bundle(3, wanted, max_shard_bytes)
    found = list(iterate_weights(pickle.loads(pickle.dumps(manifest)), shards))
    assert [name for name, _ in found] == [name for name, _ in wanted]
    for (_, a), (_, b) in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert raw(a) == raw(b)
    largest = max((tensor.nbytes for _, tensor in wanted), default=0)
    assert all(sum(data.nbytes for data in shard) <= max(max_shard_bytes, largest) for shard in shards)
    assert manifest.num_bytes == sum(tensor.nbytes for _, tensor in wanted)
    assert manifest.num_shards == len(shards)


def test_host_tensors_are_not_copied_on_either_side() -> None:
    wanted = [("a", torch.ones(4)), ("b", torch.ones(2, 3).bfloat16())]
    (shard,) = split_into_shards(0, wanted)
    assert [data.ctypes.data for data in shard] == [tensor.data_ptr() for _, tensor in wanted]
    manifest, shards = bundle(0, wanted)
    found = [tensor.data_ptr() for _, tensor in iterate_weights(manifest, shards)]
    assert found == [data.ctypes.data for data in shards[0]]


def test_tensors_are_taken_one_by_one_and_hashed_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor may be freed or changed as soon as the shard after its own is asked for."""
    manifest, _ = bundle(5, model(), 200)

    def slow(shard: Part) -> int:
        time.sleep(0.05)
        return shard_checksum(shard)

    monkeypatch.setattr(weights, "shard_checksum", slow)
    taken: list[torch.Tensor] = []

    def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in model():
            taken.append(tensor)
            yield name, tensor

    def consume() -> Iterator[Part]:
        found = yield from split_into_shards(5, one_by_one(), max_shard_bytes=200)
        assert found == manifest

    ends = [sum(entry.shard <= number for entry in manifest.entries) for number in range(manifest.num_shards)]
    for number, _ in enumerate(consume()):
        assert len(taken) <= ends[number] + 1
        for tensor in taken[: ends[number - 1] if number else 0]:
            tensor.zero_()


def test_every_flipped_byte_is_found() -> None:
    manifest, shards = bundle(1, model(), 300)
    for number, shard in enumerate(shards):
        for index, data in enumerate(shard):
            for position in range(0, len(data), 37):
                torn = [[array.copy() for array in each] for each in shards]
                torn[number][index][position] ^= 0x80
                with pytest.raises(WeightError, match=f"shard {number}: checksum"):
                    next(iterate_weights(manifest, torn))


def test_two_versions_mixed_are_refused() -> None:
    manifest, shards = bundle(1, model(0), 300)
    _, others = bundle(2, model(1), 300)
    with pytest.raises(WeightError, match="version 1, shard 1: checksum"):
        verify_shards(manifest, [shards[0], *others[1:]])
    same_sizes = [("a", torch.zeros(4)), ("b", torch.ones(4))]
    manifest, shards = bundle(1, same_sizes, 16)
    with pytest.raises(WeightError, match="version 1, shard 0: checksum"):
        verify_shards(manifest, shards[::-1])
    manifest, shards = bundle(1, same_sizes)
    with pytest.raises(WeightError, match="version 1, shard 0: checksum"):
        verify_shards(manifest, [shards[0][::-1]])


def test_wrong_lengths_are_refused() -> None:
    manifest, shards = bundle(1, model(), 300)
    with pytest.raises(WeightError, match=f"{len(shards) - 1} shards, need {len(shards)}"):
        verify_shards(manifest, shards[:-1])
    first, *others = stored_part(shards[0])
    for torn in ([first[:-1], *others], others, [first, *others, first]):
        with pytest.raises(WeightError, match=r"shard 0: \d+ tensors, \d+ bytes, need"):
            verify_shards(manifest, [torn, *shards[1:]])


def test_entries_that_do_not_fit_their_bytes_are_refused() -> None:
    manifest, shards = bundle(1, [("a", torch.zeros(4))])
    entry = dataclasses.replace(manifest.entries[0], shape=(1000,))
    with pytest.raises(WeightError, match=r"tensor a: 16 bytes are no float32 of shape \(1000,\)"):
        list(iterate_weights(dataclasses.replace(manifest, entries=(entry,)), shards))
    entry = dataclasses.replace(manifest.entries[0], dtype="float99")
    with pytest.raises(WeightError, match="tensor a: unknown dtype float99"):
        list(iterate_weights(dataclasses.replace(manifest, entries=(entry,)), shards))


def test_a_checksum_depends_on_every_byte_and_not_on_where_arrays_end() -> None:
    data = np.arange(1000, dtype=np.uint32).view(np.uint8)
    assert shard_checksum([data]) == shard_checksum([data[:7], data[7:7], data[7:]]) != shard_checksum([data[:-1]])
