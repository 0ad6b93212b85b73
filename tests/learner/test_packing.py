"""Packing: plans, positions, and attention that never crosses sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaModel

from learner.attention import PACKED_ATTENTION, attention_inputs, packed_attention, use_packed_attention
from learner.packing import plan_packs, sequence_cost
from tests.learner.sequences import packed_positions
from tests.tiny_models import tiny_llama


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 900), max_size=60),
    budget=st.integers(16, 1000),
    ranks=st.integers(1, 5),
)
def test_every_sequence_once_within_budget_and_equal_passes(lengths: list[int], budget: int, ranks: int) -> None:
    plan = plan_packs(lengths, token_budget=budget, num_ranks=ranks)
    assert len(plan) == ranks
    assert len({len(passes) for passes in plan}) == 1
    assert plan[0]
    members = [index for passes in plan for chosen in passes for index in chosen]
    assert sorted(members) == list(range(len(lengths)))
    for passes in plan:
        for chosen in passes:
            assert len(chosen) == 1 or sum(lengths[index] for index in chosen) <= budget
    number = sum(len(passes) for passes in plan)
    empty = sum(not chosen for passes in plan for chosen in passes)
    assert empty == 0 or number - empty <= len(lengths) < number
    assert plan == plan_packs(list(lengths), token_budget=budget, num_ranks=ranks)


def test_first_fit_decreasing_wastes_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(500, generator=generator) * 0.8 + 6).exp().clamp(16, 8000).int().tolist()
    plan = plan_packs(lengths, token_budget=16384)
    assert len(plan[0]) <= -(-sum(lengths) // 16384) + 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_about_the_same_cost(ranks: int) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = (torch.randn(256, generator=generator) * 0.8 + 7).exp().clamp(16, 8192).int().tolist()
    plan = plan_packs(lengths, token_budget=16384, num_ranks=ranks)
    costs = [sum(sequence_cost(lengths[i]) for chosen in passes for i in chosen) for passes in plan]
    assert max(costs) / (sum(costs) / ranks) < 1.06


def test_a_single_pass_is_split_for_two_ranks() -> None:
    plan = plan_packs([10, 10, 10, 10], token_budget=100, num_ranks=2)
    assert [[len(chosen) for chosen in passes] for passes in plan] == [[2], [2]]


def tiny_body(dtype: torch.dtype, **options: object) -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(tiny_llama(attn_implementation="sdpa", **options)).to(dtype)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sequences_do_not_see_each_other(checkpointing: bool) -> None:
    """Hidden states of packed sequences equal those of each alone under stock attention, and so do the gradients."""
    model = tiny_body(torch.float64)
    lengths = [5, 1, 9, 3]
    pieces = [torch.randn(1, length, 32, dtype=torch.float64) for length in lengths]
    alone = torch.cat([model(inputs_embeds=piece, use_cache=False)[0] for piece in pieces], dim=1)
    wanted = torch.autograd.grad((alone**2).sum(), list(model.parameters()), allow_unused=True)

    assert use_packed_attention(model) == PACKED_ATTENTION
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    positions, boundaries = packed_positions(lengths)
    packed = model(
        inputs_embeds=torch.cat(pieces, dim=1),
        position_ids=positions[None],
        use_cache=False,
        **attention_inputs(boundaries),
    )[0]
    torch.testing.assert_close(packed, alone, atol=1e-12, rtol=1e-10)
    gradients = torch.autograd.grad((packed**2).sum(), list(model.parameters()), allow_unused=True)
    for gradient, expected in zip(gradients, wanted, strict=True):
        if expected is not None:
            torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=1e-10)


def test_what_would_change_the_scores_is_refused() -> None:
    query = torch.randn(1, 4, 6, 8)
    key = torch.randn(1, 2, 6, 8)
    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)

    def attend(**options: object) -> Tensor:
        return packed_attention(torch.nn.Module(), query, key, key, None, **attention_inputs(boundaries), **options)[0]

    assert attend(sliding_window=4, softcap=None).shape == (1, 6, 4, 8)
    with pytest.raises(ValueError, match="sliding_window=3"):
        attend(sliding_window=3)
    with pytest.raises(ValueError, match="softcap"):
        attend(softcap=50.0)


def test_models_that_keep_their_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_body(torch.float32)
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(ValueError, match="attend to each other"):
        use_packed_attention(model)
