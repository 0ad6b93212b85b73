"""One soft token: filter, perturb, mix (pure torch, fp32, a function of the K largest logits only).

    logits [B, V] --top-k--> K columns --top-p, min-p--> retained --log-softmax--> l
    g = l + noise_scale * noise(ids);  w = softmax(g / gumbel_temperature) over the retained

Source: SofT-GRPO (Zheng & Lee 2025, arXiv 2511.06411), section 3; the V-wide normaliser cancels because
l is renormalised over the retained candidates. The engine calls `sample_soft_tokens` itself: there is one sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

NoiseFamily = Literal["gumbel", "gaussian", "dirichlet", "none"]
NoiseSource = Callable[[Tensor], Tensor] | Tensor


@dataclass(frozen=True)
class SoftTokenParams:
    """Settings of one soft-token draw; numeric fields may be floats or [B] tensors (one value per row).

    `noise`, `noise_clip`, `max_candidates`, `censor_delta` and `log_epsilon` are the same for a whole batch.
    """

    temperature: float | Tensor = 1.0
    """Divides the logits; 0 means greedy (one candidate, no noise)."""
    top_k: int | Tensor = 5
    top_p: float | Tensor = 0.95
    """Nucleus mass, measured inside the top-k renormalised distribution."""
    min_p: float | Tensor = 0.0
    """Candidates under min_p * max(p) are dropped, after top-p."""
    gumbel_temperature: float | Tensor = 0.1
    noise: NoiseFamily = "gumbel"
    noise_scale: float | Tensor = 1.0
    noise_clip: tuple[float, float] | None = None
    """Clamp of the raw draw; only the faithful reference mode uses (-1.5, 3)."""
    max_candidates: int = 5
    """K, the number of columns of every output; top_k may not exceed it."""
    censor_delta: float | None = None
    """Candidates with weight below censor_delta * max weight leave the executed mixture (`censored`)."""
    log_epsilon: float = 0.0
    """Added inside the logarithm; only the faithful reference mode uses 1e-6 (filtered candidates keep log 1e-6)."""


@dataclass(frozen=True)
class SoftTokens:
    """K candidates per row, sorted by descending weight."""

    ids: Tensor
    """[B, K] int32"""
    perturbed: Tensor
    """[B, K] fp32: g = l + noise_scale * e; the raw draw for gaussian and dirichlet; -inf where filtered out."""
    weights: Tensor
    """[B, K] fp32, rows sum to 1, 0 where filtered out or censored."""
    retained: Tensor
    """[B, K] bool"""
    logprobs: Tensor
    """[B, K] fp32 behaviour log-probabilities l, normalised over the retained; -inf where filtered out."""
    noise: Tensor
    """[B, K] fp32 draws e as used (after clipping); 0 where filtered out."""
    threshold: Tensor | None
    """[B] fp32 t = g_max + gumbel_temperature * log(censor_delta), or None without `censor_delta`."""


def sample_soft_tokens(logits: Tensor, params: SoftTokenParams, noise: NoiseSource) -> SoftTokens:
    """Draw one soft token per row of `logits` [B, V].

    `noise` is a callable ids [B, K] -> draws [B, K] called after the top-k, or a [B, K] tensor of raw draws in the
    order of descending probability.
    """
    raise NotImplementedError
