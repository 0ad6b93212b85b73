"""The language-model head without [T, V]: K dot products for soft positions, a chunked log-sum-exp for the rest."""

from __future__ import annotations

from torch import Tensor


def candidate_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """hidden [T, d], weight [V, d], ids [T, K] -> logits [T, K] fp32 (fp64 in fp64); differentiable in hidden, weight."""
    raise NotImplementedError


def linear_lse_gather(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [T, d], weight [V, d], ids [T, K] -> (logits at ids [T, K], log-sum-exp over V [T]), never [T, V]."""
    raise NotImplementedError
