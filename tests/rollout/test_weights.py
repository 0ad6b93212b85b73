"""Weight bundles: equal bytes back, as views, and every torn or mixed-up bundle refused."""

from __future__ import annotations

import dataclasses
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import weights
from rollout.weights import (
    ALIGNMENT,
    WeightError,
    iterate_shards,
    iterate_weights,
    make_manifest,
    pack_weights,
    shard_checksum,
    verify_shards,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def model(seed: int = 0, count: int = 7) -> list[tuple[str, torch.Tensor]]:
    """Tensors of several dtypes and shapes; scalars, empty and transposed ones too."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (), (64,), (0, 4), (17, 9), (2, 3, 4), (1,)]
    tensors = []
    for index in range(count):
        tensor = torch.randn(shapes[index % 7], generator=generator).mul(20).to(DTYPES[index % 6])
        tensors.append((f"layer.{index}.weight", tensor.t() if tensor.dim() == 2 else tensor))
    return tensors


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 20), st.sampled_from([1, 64, 100, 1000, 2**20]), st.integers(0, 3))
def test_round_trip(count: int, max_shard_bytes: int, seed: int) -> None:
    wanted = model(seed, count)
    manifest, shards = pack_weights(3, wanted, max_shard_bytes=max_shard_bytes)
    for shard in shards:
        shard.flags.writeable = False
    found = list(iterate_weights(pickle.loads(pickle.dumps(manifest)), shards))
    assert [name for name, _ in found] == [name for name, _ in wanted]
    for (_, a), (_, b) in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert raw(a) == raw(b)
    assert all(entry.offset % ALIGNMENT == 0 for entry in manifest.entries)
    largest = max((tensor.nbytes for _, tensor in wanted), default=0)
    assert all(size <= max(max_shard_bytes, largest) + ALIGNMENT for size in manifest.shard_bytes)


def test_read_tensors_are_views() -> None:
    manifest, shards = pack_weights(0, [("a", torch.zeros(4)), ("b", torch.zeros(4))])
    (_, a), (_, b) = iterate_weights(manifest, shards)
    assert a.data_ptr() == shards[0].ctypes.data
    assert b.data_ptr() == shards[0].ctypes.data + ALIGNMENT


def test_buffers_are_used_again_and_equal_weights_give_equal_shards() -> None:
    buffers = [np.full(200, 255, np.uint8), np.zeros(200, np.uint8)]
    seen = [(shard.data.copy(), shard) for shard in iterate_shards(model(), max_shard_bytes=200, buffers=buffers)]
    manifest, shards = pack_weights(5, model(), max_shard_bytes=200)
    assert len(shards) > 2
    for (copy, shard), want in zip(seen, shards, strict=True):
        assert np.array_equal(copy, want)
        assert shard.data.base is not None or len(shard.data) > 200
    assert make_manifest(5, [shard for _, shard in seen]) == manifest


def test_a_buffer_is_not_filled_again_before_it_was_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, _ = pack_weights(5, model(), max_shard_bytes=200)

    def slow(data: np.ndarray) -> int:
        time.sleep(0.05)
        return shard_checksum(data)

    monkeypatch.setattr(weights, "shard_checksum", slow)
    buffers = [np.zeros(200, np.uint8), np.zeros(200, np.uint8)]
    shards = list(iterate_shards(model(), max_shard_bytes=200, buffers=buffers))
    assert make_manifest(5, shards) == manifest


def test_every_flipped_byte_is_found() -> None:
    manifest, shards = pack_weights(1, model(), max_shard_bytes=300)
    for number, shard in enumerate(shards):
        for position in range(0, len(shard), 37):
            torn = [s.copy() for s in shards]
            torn[number][position] ^= 0x80
            with pytest.raises(WeightError, match=f"shard {number}: checksum"):
                next(iterate_weights(manifest, torn))


def test_two_versions_mixed_are_refused() -> None:
    manifest, shards = pack_weights(1, model(0), max_shard_bytes=300)
    _, others = pack_weights(2, model(1), max_shard_bytes=300)
    with pytest.raises(WeightError, match="version 1, shard 1"):
        verify_shards(manifest, [shards[0], *others[1:]])
    with pytest.raises(WeightError, match="checksum"):
        verify_shards(manifest, [shards[1], shards[0], *shards[2:]] if len(shards[0]) == len(shards[1]) else others)


def test_wrong_lengths_are_refused() -> None:
    manifest, shards = pack_weights(1, model(), max_shard_bytes=300)
    with pytest.raises(WeightError, match=f"{len(shards) - 1} shards, need {len(shards)}"):
        verify_shards(manifest, shards[:-1])
    with pytest.raises(WeightError, match="shard 0: uint8"):
        verify_shards(manifest, [shards[0][:-1], *shards[1:]])


def test_entries_outside_their_shard_are_refused() -> None:
    manifest, shards = pack_weights(1, [("a", torch.zeros(4))])
    entry = dataclasses.replace(manifest.entries[0], shape=(1000,))
    with pytest.raises(WeightError, match="tensor a: does not lie inside shard 0"):
        list(iterate_weights(dataclasses.replace(manifest, entries=(entry,)), shards))
    entry = dataclasses.replace(manifest.entries[0], dtype="float99")
    with pytest.raises(WeightError, match="tensor a: unknown dtype float99"):
        list(iterate_weights(dataclasses.replace(manifest, entries=(entry,)), shards))
