"""The block-wise selection equals a full stable sort, equal logits and all."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.candidates import BLOCK, largest_logits


def by_sorting(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = torch.sort(logits.float(), dim=1, descending=True, stable=True)
    return values[:, :count], ids[:, :count]


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.sampled_from([5, 100, 11 * BLOCK, 11 * BLOCK + 1, 40 * BLOCK - 1, 40 * BLOCK + 77]),
    count=st.integers(1, 5),
    levels=st.sampled_from([2, 5, 50, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_a_stable_sort(seed: int, vocabulary: int, count: int, levels: int, dtype: torch.dtype) -> None:
    """Few levels make nearly every entry equal to others."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randint(-levels, levels, (3, vocabulary), generator=generator) / 7).to(dtype)
    logits[0, ::2] = -math.inf
    logits[1, ::3] = -0.0
    values, ids = largest_logits(logits, count)
    wanted_values, wanted_ids = by_sorting(logits, count)
    assert torch.equal(values, wanted_values)
    assert torch.equal(ids, wanted_ids)


def test_the_largest_may_share_a_block_or_lie_in_the_tail() -> None:
    logits = torch.zeros(2, 40 * BLOCK + 3)
    logits[0, 130:135] = torch.arange(5.0) + 1
    logits[1, -3:] = 1.0
    assert largest_logits(logits, 5)[1].tolist() == [[134, 133, 132, 131, 130], [5120, 5121, 5122, 0, 1]]


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="max_candidates=5"):
        largest_logits(torch.zeros(1, 4), 5)
