"""From per-position losses to one number (pure): loss = sum(weights * per_position_loss).

The weights are those of the whole mini-batch, computed before it is cut into packed passes and ranks, so that the sum
over all of them is the same number for every cut, order and number of ranks. Data-parallel engines that *average*
gradients over R ranks (or over passes) must be given R times (or that many times) the local sum.

    token_mean     1 / number of positions in the mini-batch
    sequence_mean  1 / (number of sequences * positions of this sequence)
    constant       1 / (number of sequences * constant_length): no sequence is weighted by its own length
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def sequence_weights(lengths: Tensor, *, kind: Aggregation, constant_length: int | None = None) -> Tensor:
    """Weight [B] fp64 of one position of every sequence of the mini-batch, from the lengths [B] of *all* its sequences.

    A length counts the positions that belong to the objective, zero-advantage ones included (they are not computed, but
    they are in the mean); a sequence of length 0 counts as a sequence and has weight 0.
    """
    lengths = lengths.to(torch.float64)
    if int(lengths.sum()) == 0:
        return torch.zeros_like(lengths)
    weights = AGGREGATIONS[kind](lengths, constant_length)
    return torch.where(lengths > 0, weights, 0.0)


def aggregate(per_position: Tensor, weights: Tensor) -> Tensor:
    """The local part of the loss; [N] and [N] -> scalar of the type of the losses."""
    return (per_position * weights.to(per_position.dtype)).sum()


def _token_mean(lengths: Tensor, constant_length: int | None) -> Tensor:
    return torch.ones_like(lengths) / lengths.sum()


def _sequence_mean(lengths: Tensor, constant_length: int | None) -> Tensor:
    return 1.0 / (lengths.numel() * lengths.clamp(min=1))


def _constant(lengths: Tensor, constant_length: int | None) -> Tensor:
    if constant_length is None or constant_length < 1:
        raise ValueError("aggregation 'constant' needs constant_length (the longest response allowed)")
    return torch.full_like(lengths, 1.0 / (lengths.numel() * constant_length))


AGGREGATIONS: dict[str, Callable[[Tensor, int | None], Tensor]] = {
    "token_mean": _token_mean,
    "sequence_mean": _sequence_mean,
    "constant": _constant,
}
"""name -> f(lengths fp64 [B], constant_length) -> weights fp64 [B]."""
