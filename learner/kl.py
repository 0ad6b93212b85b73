"""Penalty towards a frozen reference policy (pure). A new estimator of one position is one entry of `ESTIMATORS`.

x = log p_policy - log p_reference at the sampled position (a log-density ratio at soft positions)
k1   x                 unbiased value; its gradient is zero in expectation
k2   x^2 / 2           gradient of the KL, biased value
k3   e^{-x} - 1 + x    unbiased and non-negative (what the released recipe uses, clamped to [-10, 10])
exact                  the categorical KL itself, zero variance: over the candidates at soft positions
                       (`candidate_kl`), over the vocabulary elsewhere (`learner.head.linear_kl`)
exact_vocabulary       over the vocabulary at soft positions too: costs the full head there
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["exact", "exact_vocabulary", "k1", "k2", "k3"]

MAX_K3 = 10.0
MAX_LOG_RATIO = 20.0
"""Inside k3 the log-ratio is clamped to +-20 before exp, so that a density ratio cannot overflow fp32."""


def sampled_kl(log_ratio: Tensor, *, estimator: KLEstimator) -> Tensor:
    """KL(policy || reference) estimated at one sample: log_ratio = log p_policy - log p_reference, any shape."""
    return ESTIMATORS[estimator](log_ratio)


def candidate_kl(logits: Tensor, reference_logits: Tensor, retained: Tensor) -> Tensor:
    """Exact KL(policy || reference) [T] of the categorical over the retained candidates; logits [T, K]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    nothing = ~retained.any(-1, keepdim=True)
    outside = ~retained & ~nothing
    log_p = logits.to(dtype).masked_fill(outside, -torch.inf).log_softmax(-1)
    log_q = reference_logits.to(dtype).masked_fill(outside, -torch.inf).log_softmax(-1)
    return torch.where(outside, 0.0, log_p.exp() * torch.where(outside, 0.0, log_p - log_q)).sum(-1)


def candidate_entropy(logits: Tensor, retained: Tensor) -> Tensor:
    """Entropy [T] of the categorical over the retained candidates; logits [T, K]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    outside = ~retained & retained.any(-1, keepdim=True)
    log_p = logits.to(dtype).masked_fill(outside, -torch.inf).log_softmax(-1)
    return -torch.where(outside, 0.0, log_p.exp() * torch.where(outside, 0.0, log_p)).sum(-1)


def _k1(log_ratio: Tensor) -> Tensor:
    return log_ratio


def _k2(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio**2


def _k3(log_ratio: Tensor) -> Tensor:
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (torch.exp(-bounded) - 1 + bounded).clamp(-MAX_K3, MAX_K3)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}
"""name -> f(log_ratio) -> estimate per position."""
