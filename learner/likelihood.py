"""Log-density of the stored noise of a soft token under a policy (pure, fp32; fp64 stays fp64).

Notation: z are candidate logits already divided by the temperature; l = log_softmax(z) over the *retained* candidates,
where the noise was drawn; g the stored perturbed values; e = (g - l_old) / s the noise; D = l_new - l_old;
n = number retained; s = noise_scale; t the censoring threshold; A = {g >= t}, m = |A|.

    reference  mean of f((g - log(q + 1e-6)) clamped to [-1.5, 3]) where log(q + 1e-6) > -3, f(e) = -e - exp(-e),
               q = softmax over all K stored ids: what the released SofT-GRPO code computes
    gumbel     all of g:                 sum_i [D_i / s - e^{-e_i} (e^{D_i / s} - 1)]
    concrete   g up to a common shift:   sum_i D_i - n [LSE(l - g) - LSE(l_old - g)]
    censored   what the model can see:   sum_A D_i - m (log S - log S_old),  S = sum_j p_j e^{-max(g_j, t)}
    argmax     the emitted token:        D_argmax
    gaussian   x_i ~ N(p_i, (0.05 s)^2), dirichlet  x_i ~ Gamma(p_i, 1): the raw draws; mixtures are x / sum(x)

Each of gumbel, concrete, censored, argmax is the conditional expectation of the one above it; `censored` at delta = 1
is `argmax`. With s != 1, concrete, censored and argmax read l as log_softmax(z / s), g as g / s and t as t / s: the
winner of the perturbation is distributed as softmax(l / s). Sources: SofT-GRPO (arXiv 2511.06411), Maddison et al.
(arXiv 1611.00712) for the density of the Concrete distribution.

A new likelihood is one function and one entry of `LIKELIHOODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Likelihood = Literal["reference", "gumbel", "concrete", "censored", "argmax", "gaussian", "dirichlet"]
NoiseFamily = Literal["gumbel", "gaussian", "dirichlet"]

REFERENCE_CLIP = (-1.5, 3.0)
REFERENCE_LOG_EPSILON = 1e-6
REFERENCE_LOG_MASK = -3.0
REFERENCE_MASK = 0.05
"""The released code masks gumbel positions at log q > -3 but gaussian and dirichlet ones at q > 0.05."""
GAUSSIAN_STD = 0.05
MAX_EXPONENT = 60.0
"""Exponents of `gumbel` are capped here, twice the 30 nats that any policy change may have: e^60 is finite in fp32 even
times the largest e^{-e}. Beyond it the gradient of that candidate is 0."""
MAX_NEGATIVE_NOISE = 5.5
"""Gumbel noise is never below -5.5 (P < 1e-100); smaller stored values are rounding of a broken draw."""
SMALLEST_DRAW = 1e-37
"""Gamma draws of tiny shape underflow in fp32: at or below this value a draw is scored as `x <= SMALLEST_DRAW`."""


@dataclass(frozen=True)
class Draw:
    """What was drawn at T soft positions."""

    perturbed: Tensor
    """[T, K] g; 0 where not retained"""
    retained: Tensor
    """[T, K] bool"""
    stored: Tensor
    """[T, K] g as stored, filtered candidates included (`reference` reads them)"""
    scale: float
    threshold: Tensor | None
    """[T] t"""
    noise: NoiseFamily
    log_epsilon: float

    @property
    def active(self) -> Tensor:
        """[T, K] bool A: the candidates of the executed mixture."""
        return self.retained & (self.perturbed >= self.censored_below[:, None])

    @property
    def censored_below(self) -> Tensor:
        """[T] t; -inf where nothing was censored (NaN in the trajectory)."""
        if self.threshold is None:
            raise ValueError("likelihood 'censored' needs the threshold of every position")
        return torch.where(torch.isnan(self.threshold), -torch.inf, self.threshold)

    def log_probs(self, logits: Tensor, scale: float = 1.0) -> Tensor:
        """[T, K] log_softmax(z / scale) over the retained; -inf elsewhere (0 in rows that retain nothing)."""
        nothing = ~self.retained.any(-1, keepdim=True)
        return (logits / scale).masked_fill(~self.retained & ~nothing, -torch.inf).log_softmax(-1)


def soft_log_density(
    candidate_logits: Tensor,
    perturbed: Tensor,
    retained: Tensor,
    *,
    likelihood: Likelihood,
    noise_scale: float = 1.0,
    threshold: Tensor | None = None,
    noise: NoiseFamily = "gumbel",
    log_epsilon: float = REFERENCE_LOG_EPSILON,
) -> Tensor:
    """Log-density [T] of `perturbed` [T, K] under `candidate_logits` [T, K].

    `threshold` [T] is the censoring threshold t (required by `censored`; NaN: nothing censored). `noise` and
    `log_epsilon` concern `reference` only: the family whose released formula is wanted and the constant inside its log.
    """
    draw, logits = _read(candidate_logits, perturbed, retained, noise_scale, threshold, noise, log_epsilon)
    return LIKELIHOODS[likelihood](draw, logits, None)


def soft_log_ratio(
    candidate_logits: Tensor,
    old_candidate_logits: Tensor,
    perturbed: Tensor,
    retained: Tensor,
    *,
    likelihood: Likelihood,
    noise_scale: float = 1.0,
    threshold: Tensor | None = None,
    noise: NoiseFamily = "gumbel",
    log_epsilon: float = REFERENCE_LOG_EPSILON,
) -> Tensor:
    """log q_new - log q_old, [T], from differences of log-probabilities: exactly 0 for equal logits.

    Finite for changes of up to 30 nats; gradients flow to `candidate_logits` only if the old ones are detached.
    """
    draw, logits = _read(candidate_logits, perturbed, retained, noise_scale, threshold, noise, log_epsilon)
    return LIKELIHOODS[likelihood](draw, logits, old_candidate_logits.to(logits.dtype))


def _read(
    logits: Tensor,
    perturbed: Tensor,
    retained: Tensor,
    scale: float,
    threshold: Tensor | None,
    noise: NoiseFamily,
    log_epsilon: float,
) -> tuple[Draw, Tensor]:
    """Everything in fp32 (fp64 if the logits are), masked values replaced before any arithmetic touches them."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    stored = perturbed.to(dtype)
    clean = torch.where(retained, stored, 0.0)
    threshold = None if threshold is None else threshold.to(dtype)
    return Draw(clean, retained, stored, scale, threshold, noise, log_epsilon), logits.to(dtype)


def _gumbel(draw: Draw, new: Tensor, old: Tensor | None) -> Tensor:
    s, retained = draw.scale, draw.retained
    if old is None:
        noise = torch.where(retained, (draw.perturbed - draw.log_probs(new)) / s, 0.0)
        density = -noise - torch.exp(-noise.clamp(min=-MAX_EXPONENT)) - math.log(s)
        return _sum(density, retained)
    old_log_probs = draw.log_probs(old)
    change = torch.where(retained, draw.log_probs(new) - old_log_probs, 0.0) / s
    noise = torch.where(retained, (draw.perturbed - old_log_probs) / s, 0.0).clamp(min=-MAX_NEGATIVE_NOISE)
    return _sum(change - torch.exp(-noise) * torch.expm1(change.clamp(max=MAX_EXPONENT)), retained)


def _concrete(draw: Draw, new: Tensor, old: Tensor | None) -> Tensor:
    return _visible_part(draw, new, old, draw.retained, draw.perturbed)


def _censored(draw: Draw, new: Tensor, old: Tensor | None) -> Tensor:
    return _visible_part(draw, new, old, draw.active, torch.maximum(draw.perturbed, draw.censored_below[:, None]))


def _visible_part(draw: Draw, new: Tensor, old: Tensor | None, active: Tensor, bound: Tensor) -> Tensor:
    """Density of g on `active` up to a common shift, given that every other retained candidate is below its bound.

    The exponential clocks p_j e^{-g_j} of all retained candidates add up to S = sum_j p_j e^{-bound_j}; integrating the
    shift out leaves Gamma(m) prod_A p_j e^{-g_j} / S^m.
    """
    s = draw.scale
    count = active.sum(-1)
    l_new = draw.log_probs(new, s)
    log_s = torch.logsumexp(l_new - bound / s, -1)
    if old is None:
        shared = torch.lgamma(count.to(l_new.dtype)) - (count - 1) * math.log(s)
        return shared + _sum(l_new - draw.perturbed / s, active) - count * log_s
    l_old = draw.log_probs(old, s)
    return _sum(l_new - l_old, active) - count * (log_s - torch.logsumexp(l_old - bound / s, -1))


def _argmax(draw: Draw, new: Tensor, old: Tensor | None) -> Tensor:
    winner = torch.where(draw.retained, draw.perturbed, -torch.inf).argmax(-1, keepdim=True)
    log_prob = draw.log_probs(new, draw.scale).gather(-1, winner).squeeze(-1)
    if old is None:
        return log_prob
    return log_prob - draw.log_probs(old, draw.scale).gather(-1, winner).squeeze(-1)


def _gaussian(draw: Draw, new: Tensor, old: Tensor | None) -> Tensor:
    std = GAUSSIAN_STD * draw.scale
    p_new = draw.log_probs(new).exp()
    if old is None:
        return _sum(_normal_log_prob(draw.perturbed, p_new, std), draw.retained)
    p_old = draw.log_probs(old).exp()
    # (x - p_old)^2 - (x - p_new)^2, factored so that equal policies give exactly 0
    return _sum((p_new - p_old) * (2 * draw.perturbed - p_new - p_old), draw.retained) / (2 * std**2)


def _dirichlet(draw: Draw, new: Tensor, old: Tensor | None) -> Tensor:
    shape_new = draw.log_probs(new).exp()
    if old is None:
        return _sum(_gamma_log_prob(draw.perturbed, shape_new), draw.retained)
    shape_old = draw.log_probs(old).exp()
    ratio = _gamma_log_prob(draw.perturbed, shape_new) - _gamma_log_prob(draw.perturbed, shape_old)
    return _sum(ratio, draw.retained)


def _reference(draw: Draw, new: Tensor, old: Tensor | None) -> Tensor:
    density = _reference_log_density(draw, new)
    return density if old is None else density - _reference_log_density(draw, old)


def _reference_log_density(draw: Draw, logits: Tensor) -> Tensor:
    """The released estimator: a mean over a mask that moves with the policy, of clamped scores."""
    q = logits.softmax(-1)
    if draw.noise == "gumbel":
        log_q = torch.log(q + draw.log_epsilon)
        noise = (draw.stored - log_q).clamp(*REFERENCE_CLIP)
        score, counted = -noise - torch.exp(-noise), log_q > REFERENCE_LOG_MASK
    elif draw.noise == "gaussian":
        width = 3 * GAUSSIAN_STD
        clipped = torch.minimum(torch.maximum(draw.stored, q - width), q + width)
        score, counted = _normal_log_prob(clipped, q, GAUSSIAN_STD), q > REFERENCE_MASK
    else:
        score, counted = _gamma_log_prob(draw.stored, q).clamp(-5.0, 3.0), q > REFERENCE_MASK
    return _sum(score, counted) / counted.sum(-1).clamp(min=1)


def _normal_log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))


def _gamma_log_prob(x: Tensor, shape: Tensor) -> Tensor:
    """log Gamma(x; shape, 1); at or below SMALLEST_DRAW the log of P(X <= SMALLEST_DRAW) = x^shape / Gamma(shape + 1).

    The ratio of independent Gammas is the ratio of their normalised weights too: the shapes of every policy add up to
    1, so the density of the total does not depend on the policy.
    """
    shape = shape.clamp(min=torch.finfo(shape.dtype).tiny)
    observed = x.clamp(min=SMALLEST_DRAW)
    density = (shape - 1) * observed.log() - observed - torch.lgamma(shape)
    mass = shape * math.log(SMALLEST_DRAW) - torch.lgamma(shape + 1)
    return torch.where(x > SMALLEST_DRAW, density, mass)


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    """Row sums over the mask; `where` before the sum, because 0 x inf is NaN in the backward pass."""
    return torch.where(mask, values, 0.0).sum(-1)


LIKELIHOODS: dict[str, Callable[[Draw, Tensor, Tensor | None], Tensor]] = {
    "reference": _reference,
    "gumbel": _gumbel,
    "concrete": _concrete,
    "censored": _censored,
    "argmax": _argmax,
    "gaussian": _gaussian,
    "dirichlet": _dirichlet,
}
"""name -> f(draw, new logits [T, K], old logits or None) -> log-ratio [T], or log-density [T] without old logits."""
