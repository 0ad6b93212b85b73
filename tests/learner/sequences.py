"""Random replayed sequences for tests of packing and objective, and their packing without the product's replay code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.packing import ReplayBatch
from rollout.trajectory import Kind

CANDIDATES = 5
VOCABULARY = 41


@dataclass(frozen=True)
class Replayed:
    """One response: a prompt, soft positions, the end of thinking, discrete positions."""

    prompt_ids: Tensor
    ids: Tensor
    kinds: Tensor
    advantage: float
    candidate_ids: Tensor
    retained: Tensor
    logprobs: Tensor
    perturbed: Tensor
    threshold: Tensor
    weights: Tensor
    log_prob: Tensor
    """[T] behaviour, of emitted tokens"""

    @property
    def num_rows(self) -> int:
        return len(self.prompt_ids) + len(self.ids) - 1


def random_sequences(
    lengths: list[int], *, seed: int = 0, dtype: torch.dtype = torch.float64, tau: float = 0.1, delta: float = 1e-3
) -> list[Replayed]:
    """One response per length, about half of it soft; advantages alternate in sign."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)

    sequences = []
    for number, length in enumerate(lengths):
        soft = length // 2
        kinds = [Kind.SOFT] * soft + [Kind.ENDED] + [Kind.DISCRETE] * (length - soft - 1)
        retained = uniform(soft, CANDIDATES) > 0.3
        retained[:, 0] = True
        logits = torch.randn(soft, CANDIDATES, generator=generator, dtype=torch.float64) * 2
        logprobs = logits.masked_fill(~retained, -torch.inf).log_softmax(-1)
        perturbed = logprobs - torch.log(-torch.log(uniform(soft, CANDIDATES)))
        threshold = perturbed.amax(-1) + tau * math.log(delta)
        executed = perturbed.masked_fill(perturbed < threshold[:, None], -torch.inf)
        candidates = [torch.randperm(VOCABULARY, generator=generator)[:CANDIDATES] for _ in range(soft)]
        candidate_ids = torch.stack(candidates) if soft else torch.zeros(0, CANDIDATES, dtype=torch.int64)
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        if soft:
            ids[:soft] = candidate_ids.gather(-1, perturbed.argmax(-1, keepdim=True)).squeeze(-1)
        sequences.append(
            Replayed(
                prompt_ids=torch.randint(0, VOCABULARY, (2 + number % 3,), generator=generator),
                ids=ids,
                kinds=torch.tensor(kinds, dtype=torch.uint8),
                advantage=(-1.0) ** number * (0.5 + float(uniform(1))),
                candidate_ids=candidate_ids,
                retained=retained,
                logprobs=logprobs.to(dtype),
                perturbed=perturbed.to(dtype),
                threshold=threshold.to(dtype),
                weights=(executed / tau).softmax(-1).to(dtype),
                log_prob=uniform(length).log().to(dtype) * 3,
            )
        )
    return sequences


def packed_positions(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(position_ids [L] int64, from 0 in every sequence; cu_seqlens [B + 1] int32) of sequences one after another."""
    counts = torch.tensor(list(lengths), dtype=torch.int64)
    boundaries = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    boundaries[1:] = counts.cumsum(0)
    positions = torch.arange(int(boundaries[-1])) - torch.repeat_interleave(boundaries[:-1], counts)
    return positions, boundaries.to(torch.int32)


def pack(sequences: list[Replayed], position_weights: list[float]) -> ReplayBatch:
    """One pass of whole sequences in the given order; `position_weights` are one per sequence."""
    positions, boundaries = packed_positions([s.num_rows for s in sequences])
    dtype = sequences[0].log_prob.dtype
    first = [int(start) + len(s.prompt_ids) for s, start in zip(sequences, boundaries[:-1], strict=True)]
    inputs = [s.kinds[:-1] == Kind.SOFT for s in sequences]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(s, name) for s in sequences])

    def spread(values: list[float]) -> Tensor:
        pairs = zip(sequences, values, strict=True)
        return torch.cat([torch.full((len(s.ids),), value, dtype=torch.float64) for s, value in pairs])

    kinds = joined("kinds")
    return ReplayBatch(
        input_ids=torch.cat([torch.cat([s.prompt_ids, s.ids[:-1]]) for s in sequences]),
        position_ids=positions,
        cu_seqlens=boundaries,
        mixture_rows=torch.cat([start + m.nonzero().flatten() for start, m in zip(first, inputs, strict=True)]),
        mixture_ids=torch.cat([s.candidate_ids[: int(m.sum())] for s, m in zip(sequences, inputs, strict=True)]),
        mixture_weights=torch.cat([s.weights[: int(m.sum())] for s, m in zip(sequences, inputs, strict=True)]),
        rows=torch.cat([start - 1 + torch.arange(len(s.ids)) for s, start in zip(sequences, first, strict=True)]),
        sequence=torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor([len(s.ids) for s in sequences])),
        kinds=kinds,
        ids=joined("ids"),
        temperature=torch.where(kinds == Kind.DISCRETE, 0.7, 1.0).to(dtype),
        advantages=spread([s.advantage for s in sequences]).to(dtype),
        weights=spread(position_weights),
        behaviour_log_prob=joined("log_prob"),
        candidate_ids=joined("candidate_ids"),
        perturbed=joined("perturbed"),
        retained=joined("retained"),
        threshold=joined("threshold"),
        behaviour_logprobs=joined("logprobs"),
        top_weight=joined("weights").amax(-1),
    )
