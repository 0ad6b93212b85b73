"""Packing: many variable-length responses in one forward pass, none attending to another.

    lengths --plan_packs--> sequences per rank and pass --ReplayBatch--> rows [L] (flat, sequence after sequence)

A sequence is never split, so sequence-level ratios and means are local to one pass. A response of T positions behind a
prompt of P tokens takes P + T - 1 rows: the hidden state of row r scores the position whose input is row r + 1, and
nothing is scored by the last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

QUADRATIC_LENGTH = 32768
"""Rows at which the attention of a 1.5B-class model (28 layers, d = 1536) costs as much as its matrices."""


@dataclass(frozen=True)
class ReplayBatch:
    """One packed forward pass: B sequences in L rows, N scored positions of which S are soft, K candidates.

    Scored positions are in row order; the soft ones among them (`kinds == Kind.SOFT`) have their candidates in the
    `[S, K]` fields, in the same order. Prompt, forced and zero-advantage positions (unless the KL needs them) are not
    scored: they only are input rows.
    """

    input_ids: Tensor
    """[L] int64; the emitted token at soft rows (their embedding is replaced by the mixture)"""
    position_ids: Tensor
    """[L] int64, from 0 in every sequence"""
    cu_seqlens: Tensor
    """[B + 1] int32, first row of every sequence and L"""
    mixture_rows: Tensor
    """[M] int64 rows whose input is a soft token"""
    mixture_ids: Tensor
    """[M, K] int64"""
    mixture_weights: Tensor
    """[M, K] fp32 as executed by the engine"""

    rows: Tensor
    """[N] int64 rows whose hidden state scores a position"""
    sequence: Tensor
    """[N] int64 in [0, B): the sequence of the position"""
    kinds: Tensor
    """[N] uint8, `rollout.trajectory.Kind`: SOFT, ENDED or DISCRETE"""
    ids: Tensor
    """[N] int64 emitted tokens"""
    temperature: Tensor
    """[N] fp32 divisor of the logits"""
    advantages: Tensor
    """[N] fp32"""
    weights: Tensor
    """[N] fp32 or fp64 aggregation weights (`learner.aggregation`) of the whole mini-batch: the loss is their sum
    times the per-position losses"""
    behaviour_log_prob: Tensor
    """[N] fp32 log-probability of the emitted token in the engine; unused at soft positions"""

    candidate_ids: Tensor
    """[S, K] int64"""
    perturbed: Tensor
    """[S, K] fp32 g"""
    retained: Tensor
    """[S, K] bool"""
    threshold: Tensor
    """[S] fp32 censoring threshold; NaN where the mixture was not censored"""
    behaviour_logprobs: Tensor
    """[S, K] fp32 of the engine, -inf where filtered out"""
    top_weight: Tensor | None = None
    """[S] fp32 executed weight of the heaviest candidate; only a diagnostic"""

    old: ScoredLogits | None = None
    """Scores under the policy before the update; None: the policy has not changed, or `old_log_density: behaviour`."""
    reference: ScoredLogits | None = None
    """Scores under the frozen reference policy; None without KL."""

    def to(self, device: torch.device | str) -> ReplayBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value if value is None else value.to(device)
        return replace(self, **moved)


@dataclass(frozen=True)
class ScoredLogits:
    """What a forward pass without gradient leaves behind for the same positions of a `ReplayBatch`."""

    candidate_logits: Tensor
    """[S, K] fp32, divided by the temperature"""
    log_prob: Tensor
    """[N] fp32 full-vocabulary log-probability of the emitted token at its temperature; 0 at soft positions"""
    hidden: Tensor | None = None
    """[R, d] hidden states of the positions whose exact KL is over the whole vocabulary (`KeptStates`)"""

    def to(self, device: torch.device | str) -> ScoredLogits:
        """The same scores on another device."""
        hidden = None if self.hidden is None else self.hidden.to(device)
        return ScoredLogits(self.candidate_logits.to(device), self.log_prob.to(device), hidden)


def plan_packs(lengths: Sequence[int], *, token_budget: int, num_ranks: int = 1) -> list[list[list[int]]]:
    """Cut sequences into passes and deal the passes to ranks: [num_ranks][passes][sequence indices].

    Passes are filled first-fit-decreasing up to `token_budget` rows; a longer sequence has one of its own. Every rank
    gets the same number of passes (collectives inside a pass would hang otherwise) of about the same total cost; a pass
    is empty only if there are fewer sequences than passes. Depends on nothing but the arguments.
    """
    passes = _first_fit_decreasing(lengths, token_budget)
    while len(passes) % num_ranks or not passes:
        _split_costliest(passes, lengths)
    per_rank = len(passes) // num_ranks
    costs = [_cost(lengths, members) for members in passes]
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for index in sorted(range(len(passes)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(num_ranks) if len(plan[r]) < per_rank), key=lambda r: (totals[r], r))
        plan[rank].append(passes[index])
        totals[rank] += costs[index]
    return plan


def _first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    passes: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for number, room in enumerate(free):
            if lengths[index] <= room:
                passes[number].append(index)
                free[number] -= lengths[index]
                break
        else:
            passes.append([index])
            free.append(budget - lengths[index])
    return passes


def _split_costliest(passes: list[list[int]], lengths: Sequence[int]) -> None:
    """Deal the members of the costliest pass that has several to two passes; if none has, add an empty pass."""
    splittable = [number for number, members in enumerate(passes) if len(members) > 1]
    if not splittable:
        passes.append([])
        return
    number = max(splittable, key=lambda i: (_cost(lengths, passes[i]), -i))
    halves: tuple[list[int], list[int]] = ([], [])
    for index in passes[number]:  # longest first
        min(halves, key=lambda half: _cost(lengths, half)).append(index)
    passes[number] = halves[0]
    passes.append(halves[1])


def _cost(lengths: Sequence[int], members: Sequence[int]) -> float:
    return sum(sequence_cost(lengths[index]) for index in members)


def sequence_cost(length: int) -> float:
    """Relative cost of a sequence: linear in its rows, plus attention, which doubles it at QUADRATIC_LENGTH rows."""
    return length + length**2 / QUADRATIC_LENGTH
