"""One soft token: filter, perturb, mix (pure torch, a function of the K largest logits only).

    logits [B, V] --top-k--> K columns --top-p, min-p--> retained --log-softmax--> l
    g = l + noise_scale * noise(ids);  w = softmax(g / gumbel_temperature) over the retained

Source: SofT-GRPO (Zheng & Lee 2025, arXiv 2511.06411), section 3; the V-wide normaliser cancels because
l is renormalised over the retained candidates. The engine calls `sample_soft_tokens` itself: there is one sampler.

Rounding. Everything after the top-k is [B, K] and done in fp64, so that which candidates survive and how they are
ordered does not hang on the order of an fp32 sum; l and the noise are rounded once to fp32, `perturbed_values` makes g
of these two *rounded* numbers (whoever stores l and e rebuilds g to the bit), weights are rounded once. Equal logits,
common in bf16, are ordered by token id. No host synchronisation, no data-dependent shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rollout.candidates import largest_logits
from rollout.noise import CounterNoise

NoiseFamily = Literal["gumbel", "gaussian", "dirichlet", "none"]
NoiseSource = Callable[[Tensor], Tensor] | Tensor

GAUSSIAN_SIGMA = 0.05
"""Standard deviation of `gaussian` noise on the probabilities, at noise_scale 1 (the released code's value)."""


@dataclass(frozen=True)
class SoftTokenParams:
    """Settings of one soft-token draw; numeric fields may be floats or [B] tensors (one value per row).

    `noise`, `noise_clip`, `max_candidates`, `censor_delta` and `log_epsilon` are the same for a whole batch.
    Plain numbers are checked (`ValueError`); tensors are not, that would synchronise with the device.
    """

    temperature: float | Tensor = 1.0
    """Divides the logits; 0 means greedy (one candidate, no noise)."""
    top_k: int | Tensor = 5
    top_p: float | Tensor = 0.95
    """Nucleus mass, measured inside the top-k renormalised distribution."""
    min_p: float | Tensor = 0.0
    """Candidates under min_p * max(p) are dropped, after top-p."""
    gumbel_temperature: float | Tensor = 0.1
    """Of the softmax over perturbed values (`noise: none` mixes by probability instead); 0 puts all weight on the
    heaviest candidate, whatever the noise."""
    noise: NoiseFamily = "gumbel"
    noise_scale: float | Tensor = 1.0
    """Multiplies Gumbel draws and the standard deviation of gaussian ones; `dirichlet` has no scale."""
    noise_clip: tuple[float, float] | None = None
    """Clamp of the raw draw; only the faithful reference mode uses (-1.5, 3)."""
    max_candidates: int = 5
    """K, the number of columns of every output; top_k may not exceed it."""
    censor_delta: float | None = None
    """Candidates with weight below censor_delta * max weight leave the executed mixture (`censored`)."""
    log_epsilon: float = 0.0
    """Added inside the logarithm; only the faithful reference mode uses 1e-6 (filtered candidates keep log 1e-6)."""

    def __post_init__(self) -> None:
        bounds = (
            ("temperature", self.temperature, 0.0, math.inf, True),
            ("top_k", self.top_k, 1, self.max_candidates, True),
            ("top_p", self.top_p, 0.0, 1.0, False),
            ("min_p", self.min_p, 0.0, 1.0, True),
            ("gumbel_temperature", self.gumbel_temperature, 0.0, math.inf, True),
            ("noise_scale", self.noise_scale, 0.0, math.inf, True),
            ("log_epsilon", self.log_epsilon, 0.0, 1.0, True),
        )
        if self.max_candidates < 1:
            raise ValueError(f"max_candidates={self.max_candidates}: at least 1")
        for name, value, low, high, low_allowed in bounds:
            if isinstance(value, Tensor):
                continue
            if not (low <= value <= high) or (value == low and not low_allowed) or math.isinf(value):
                raise ValueError(f"{name}={value}: must be {'>=' if low_allowed else '>'} {low} and <= {high}")
        if self.noise not in ("gumbel", "gaussian", "dirichlet", "none"):
            raise ValueError(f"noise={self.noise!r}: gumbel, gaussian, dirichlet or none")
        if self.noise_clip is not None and self.noise_clip[0] >= self.noise_clip[1]:
            raise ValueError(f"noise_clip={self.noise_clip}: give (low, high) with low < high")
        if self.censor_delta is not None:
            if not 0.0 < self.censor_delta <= 1.0:
                raise ValueError(f"censor_delta={self.censor_delta}: must be > 0 and <= 1")
            if self.noise in ("gaussian", "dirichlet"):
                raise ValueError(f"censor_delta with noise={self.noise}: the censored mixture is one of gumbel noise")


@dataclass(frozen=True)
class SoftTokens:
    """K candidates per row, sorted by descending perturbed value (thus by weight); ids[:, 0] is the emitted token."""

    ids: Tensor
    """[B, K] int32"""
    perturbed: Tensor
    """[B, K] fp32: g = l + noise_scale * e; the raw draw for gaussian and dirichlet; -inf where filtered out."""
    weights: Tensor
    """[B, K] fp32, rows sum to 1, 0 where filtered out or censored (gaussian ones may be negative)."""
    retained: Tensor
    """[B, K] bool: survived top-k, top-p and min-p."""
    logprobs: Tensor
    """[B, K] fp32 behaviour log-probabilities l, normalised over the retained; -inf where filtered out."""
    noise: Tensor
    """[B, K] fp32 draws e as used (after clipping), 0 where filtered out; = `perturbed` for gaussian, dirichlet."""
    threshold: Tensor | None
    """[B] fp32 t = g_max + gumbel_temperature * log(censor_delta), or None without `censor_delta`."""


def sample_soft_tokens(logits: Tensor, params: SoftTokenParams, noise: NoiseSource) -> SoftTokens:
    """Draw one soft token per row of `logits` [B, V].

    `noise` is a `CounterNoise`, another callable ids [B, K] -> draws [B, K] called after the top-k, or a [B, K] tensor
    of raw draws in the order of descending probability. Raw draws are Gumbel(0, 1) for `gumbel` and the perturbed
    probabilities themselves for `gaussian` (N(p, (0.05 noise_scale)^2)) and `dirichlet` (Gamma(p, 1)); only a
    `CounterNoise` can make the latter two, which depend on p. With `log_epsilon` (faithful mode) filtered candidates
    stay in the mixture at log(log_epsilon) while `retained` says that they were filtered. Logits of -inf never survive.
    """
    values, ids = largest_logits(logits, params.max_candidates)
    logprobs, greedy = _filter(values, params)
    retained = mixed = logprobs > -math.inf
    if params.log_epsilon > 0:
        mixed = (values > -math.inf) & (retained | ~greedy)
        logprobs = torch.log(torch.exp(logprobs) + params.log_epsilon).masked_fill(~mixed, -math.inf)
    draws, perturbed = _perturb(logprobs, ids, mixed, greedy, params, noise)
    perturbed, order = torch.sort(perturbed, dim=-1, descending=True, stable=True)
    weights, threshold = _mixture(perturbed, params)
    return SoftTokens(
        ids=ids.gather(1, order).to(torch.int32),
        perturbed=perturbed,
        weights=weights,
        retained=retained.gather(1, order),
        logprobs=logprobs.to(torch.float32).gather(1, order),
        noise=draws.gather(1, order),
        threshold=threshold,
    )


def _column(value: float | Tensor) -> float | Tensor:
    """A per-row setting as something that broadcasts over [B, K] in fp64."""
    return value.to(torch.float64)[:, None] if isinstance(value, Tensor) else float(value)


def _filter(values: Tensor, params: SoftTokenParams) -> tuple[Tensor, Tensor]:
    """fp64 log-probabilities [B, K] renormalised over the retained, -inf elsewhere; which rows are greedy, [B or 1, 1].

    The exclusive cumulative mass decides top-p, so the most probable candidate always survives.
    """
    temperature, top_k, top_p = _column(params.temperature), _column(params.top_k), _column(params.top_p)
    rank = torch.arange(values.shape[1], device=values.device)
    if isinstance(temperature, Tensor):
        greedy = temperature == 0
        scaled = values / temperature.masked_fill(greedy, 1.0)
    else:
        greedy = torch.full((1, 1), temperature == 0, device=values.device)
        scaled = values.to(torch.float64) / (temperature or 1.0)
    scaled = scaled.masked_fill((rank >= top_k) | (greedy & (rank > 0)), -math.inf)
    probabilities = torch.softmax(scaled, dim=-1)
    before = torch.cumsum(probabilities, dim=-1) - probabilities
    # top_p 1 keeps all, also a candidate so improbable that the mass before it rounds to 1.
    out = (before >= top_p) & (top_p < 1.0)
    out = out | (probabilities < _column(params.min_p) * probabilities[:, :1])
    return torch.log_softmax(scaled.masked_fill(out, -math.inf), dim=-1), greedy


def _perturb(
    logprobs: Tensor, ids: Tensor, mixed: Tensor, greedy: Tensor, params: SoftTokenParams, noise: NoiseSource
) -> tuple[Tensor, Tensor]:
    """fp32 draws (0 outside the mixture) and perturbed values (-inf outside it)."""
    rounded = logprobs.to(torch.float32)
    if params.noise == "none":
        return torch.zeros_like(rounded), rounded
    draws = _draw(logprobs, ids, mixed, params, noise)
    if params.noise_clip is not None:
        draws = draws.clamp(*params.noise_clip)
    if params.noise == "gumbel":
        draws = draws.masked_fill(~mixed | greedy, 0.0)
        return draws, perturbed_values(rounded, draws, params.noise_scale)
    draws = draws.masked_fill(greedy, 1.0)
    return draws.masked_fill(~mixed, 0.0), draws.masked_fill(~mixed, -math.inf)


def perturbed_values(logprobs: Tensor, noise: Tensor, noise_scale: float | Tensor) -> Tensor:
    """g = l + noise_scale * e of fp32 l and e [B, K], to the bit on every machine; the scale is one number or [B].

    Of three fp32 numbers the product is exact in fp64, so that a compiler may fuse it with the sum or not; in fp32 it
    would change the last bit, and the learner could find the heaviest candidate below its own threshold.
    """
    scale = torch.as_tensor(noise_scale, dtype=torch.float32, device=noise.device).to(torch.float64)
    return (logprobs.to(torch.float64) + noise.to(torch.float64) * scale[..., None]).to(torch.float32)


def _draw(logprobs: Tensor, ids: Tensor, mixed: Tensor, params: SoftTokenParams, noise: NoiseSource) -> Tensor:
    """Raw draws [B, K] fp32 from whichever source was given."""
    if isinstance(noise, CounterNoise) and params.noise == "gaussian":
        sigma = GAUSSIAN_SIGMA * _column(params.noise_scale)
        return (torch.exp(logprobs) + sigma * noise.normal(ids).to(torch.float64)).to(torch.float32)
    if isinstance(noise, CounterNoise) and params.noise == "dirichlet":
        return noise.gamma(ids, torch.exp(logprobs).masked_fill(~mixed, 1.0))
    draws = noise if isinstance(noise, Tensor) else noise(ids)
    if draws.shape != ids.shape:
        raise ValueError(f"noise {tuple(draws.shape)}: need one draw per candidate, {tuple(ids.shape)}")
    return draws.to(torch.float32)


def _mixture(perturbed: Tensor, params: SoftTokenParams) -> tuple[Tensor, Tensor | None]:
    """fp32 weights of sorted perturbed values (0 where censored) and the censoring threshold [B]."""
    values = perturbed.to(torch.float64)
    tau = torch.as_tensor(_column(params.gumbel_temperature), dtype=torch.float64, device=values.device)
    single = tau == 0
    heaviest = torch.zeros_like(perturbed)
    heaviest[:, 0] = 1.0
    if params.noise in ("gaussian", "dirichlet"):
        present = values.masked_fill(perturbed == -math.inf, 0.0)
        weights = (present / present.sum(dim=-1, keepdim=True)).to(torch.float32)
        return torch.where(single, heaviest, weights), None
    if params.noise == "none":
        tau = torch.ones_like(tau)
    threshold = None
    if params.censor_delta is not None:
        # Compared in fp32 with the fp32 values, as the learner does with what was stored.
        threshold = (values[:, :1] + tau * math.log(params.censor_delta)).to(torch.float32)
        values = values.masked_fill(perturbed < threshold, -math.inf)
        threshold = threshold.squeeze(1)
    weights = torch.softmax((values - values[:, :1]) / tau.masked_fill(single, 1.0), dim=-1).to(torch.float32)
    return torch.where(single, heaviest, weights), threshold


def mix_embeddings(weight: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights[..., k] * weight[ids[..., k]]: fp32 products and sum, one rounding to the model's dtype.

    `weight` [V, H], `ids` [..., K] integer, `weights` [..., K] fp32 -> [..., H].
    """
    return partial_mixture(weight, ids, weights).to(weight.dtype)


def partial_mixture(
    weight: Tensor, ids: Tensor, weights: Tensor, vocab_start: int = 0, vocab_end: int | None = None
) -> Tensor:
    """The fp32 part of a mixture that lies in the rows [vocab_start, vocab_end) held by this rank, [..., H].

    Tensor-parallel ranks add their parts in fp32 and round afterwards, so that TP does not change the embedding
    beyond the order of the sum.
    """
    if vocab_end is not None:
        local = (ids >= vocab_start) & (ids < vocab_end)
        ids = torch.where(local, ids - vocab_start, 0)
        weights = torch.where(local, weights, 0.0)
    rows = torch.nn.functional.embedding(ids, weight).to(torch.float32)
    # Not a matmul: TF32 would round the operands, and a library may pick another order for another batch size.
    return (rows * weights.to(torch.float32).unsqueeze(-1)).sum(dim=-2)
