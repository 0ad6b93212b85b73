"""The objective: from the hidden states of the scored positions to one number, readable in one pass.

    hidden [N, d] -- soft rows ------> candidate_logits [S, K] --> soft_log_ratio [S] --+
                  \\- other rows -----> linear_lse_gather ------> log_prob - old --------+--> log_ratio [N]
    log_ratio --policy_loss--> per position [N] (* truncated importance weight) + beta KL - bonus entropy
    loss = sum(aggregation weights * per position): the local part of the mini-batch's loss (`learner.aggregation`)

Pure: no collectives, no state, no random numbers. Everything after the head is fp32 (fp64 for fp64 hidden states).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from learner.aggregation import aggregate
from learner.diagnostics import Statistics
from learner.head import Gather, candidate_logits, linear_kl, linear_lse_gather
from learner.kl import KLEstimator, candidate_entropy, candidate_kl, sampled_kl
from learner.likelihood import Likelihood, NoiseFamily, soft_log_ratio
from learner.packing import ReplayBatch, ScoredLogits
from learner.policy_loss import MAX_LOG_RATIO, PolicyLoss, importance_weight, policy_loss, sequence_log_ratio
from rollout.trajectory import Kind

KeptStates = Literal["none", "discrete", "all"]
"""Scored positions whose exact KL is over the whole vocabulary: it needs the reference's hidden states there."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """The algorithm; fields have the names and meanings of the `algorithm` section of the configuration."""

    likelihood: Likelihood | Literal["none"] = "censored"
    """`none`: soft positions are not part of the objective"""
    noise: NoiseFamily = "gumbel"
    noise_scale: float = 1.0
    old_log_density: Literal["recompute", "behaviour"] = "recompute"
    policy_loss: PolicyLoss = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    importance_cap: float | None = None
    """Largest weight of a position for the gap between engine and learner; only under `recompute`"""
    entropy_bonus: float = 0.0
    kl_coefficient: float = 0.0
    kl_estimator: KLEstimator = "k3"

    @property
    def needs_reference(self) -> bool:
        """Whether a forward pass of the reference policy is needed."""
        return self.kl_coefficient > 0

    @property
    def keeps_states(self) -> KeptStates:
        """What the KL needs of the reference besides scores."""
        if not self.needs_reference or not self.kl_estimator.startswith("exact"):
            return "none"
        return "all" if self.kl_estimator == "exact_vocabulary" else "discrete"

    @property
    def loss_options(self) -> dict[str, Any]:
        """Keyword arguments of the policy loss."""
        if self.policy_loss == "sapo":
            return {}
        options: dict[str, Any] = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return options if self.policy_loss == "cispo" else {**options, "dual_clip": self.dual_clip}


@dataclass(frozen=True)
class _Scores:
    """Differentiable statistics of the head at the scored positions."""

    candidate_logits: Tensor
    """[S, K], divided by the temperature"""
    log_prob: Tensor
    """[N - S] of the emitted tokens, full vocabulary"""
    entropy: Tensor
    """[N] categorical: over the candidates at soft positions, over the vocabulary elsewhere"""


def score_positions(
    hidden: Tensor, weight: Tensor, batch: ReplayBatch, *, keep: KeptStates = "none", gather: Gather | None = None
) -> ScoredLogits:
    """Scores of a policy at the positions of a batch, without gradient: for `ReplayBatch.old` and `.reference`.

    hidden [N, d] are the hidden states of `batch.rows`, weight [V, d] the head; `keep` names those that are kept.
    """
    soft, other = _rows_by_kind(batch)
    with torch.no_grad():
        scores = _score(hidden, weight, batch, soft, other, torch.ones_like(batch.retained), False, gather)
        log_prob = scores.log_prob.new_zeros(batch.rows.shape[0]).index_copy(0, other, scores.log_prob)
    kept = {"none": None, "discrete": hidden[other].detach(), "all": hidden.detach()}[keep]
    return ScoredLogits(scores.candidate_logits, log_prob, kept)


def objective(
    hidden: Tensor,
    weight: Tensor,
    batch: ReplayBatch,
    settings: ObjectiveSettings,
    *,
    reference_weight: Tensor | None = None,
    gather: Gather | None = None,
) -> tuple[Tensor, Statistics]:
    """Local loss (a scalar) and statistics of one packed pass.

    hidden [N, d] are the hidden states of `batch.rows`, weight [V, d] the head; `reference_weight` [V, d] is the head
    of the reference policy, needed by exact KL where positions are scored over the whole vocabulary.
    """
    soft, other = _rows_by_kind(batch)
    support = torch.ones_like(batch.retained) if settings.likelihood == "reference" else batch.retained
    new = _score(hidden, weight, batch, soft, other, support, True, gather)
    behaviour = ScoredLogits(batch.behaviour_logprobs, batch.behaviour_log_prob)
    before = batch.old or ScoredLogits(
        new.candidate_logits.detach(), _spread(batch, soft, torch.zeros_like(soft), other, new.log_prob.detach())
    )
    old = behaviour if settings.old_log_density == "behaviour" else before

    mask = torch.ones_like(batch.rows, dtype=torch.bool)
    if settings.likelihood == "none":
        mask[soft] = False
    log_ratio = _log_ratio(new.candidate_logits, new.log_prob, old, batch, settings, soft, other)
    options = settings.loss_options
    if settings.policy_loss == "gspo":
        options["sequence_ids"] = batch.sequence
    advantages = batch.advantages.to(log_ratio.dtype)
    per_position = policy_loss(log_ratio, advantages, mask, kind=settings.policy_loss, **options)

    # How far the engine's policy is from the learner's view of the same policy, before this update. Under `behaviour`
    # the ratio itself already starts from the engine, so a second weight would count the gap twice.
    gap = _log_ratio(before.candidate_logits, before.log_prob[other], behaviour, batch, settings, soft, other).detach()
    correction = torch.ones_like(gap)
    if settings.importance_cap is not None and settings.old_log_density == "recompute":
        correction = importance_weight(gap, torch.zeros_like(gap), settings.importance_cap)
        per_position = per_position * correction

    kl = torch.zeros_like(per_position)
    if settings.needs_reference:
        kl = _reference_kl(new, hidden, weight, batch, settings, soft, other, support, reference_weight, gather)
    entropy = new.entropy if settings.entropy_bonus > 0 else new.entropy.detach()
    kl, entropy = torch.where(mask, kl, 0.0), torch.where(mask, entropy, 0.0)
    parts = {
        "policy_loss": aggregate(per_position, batch.weights),
        "kl_loss": settings.kl_coefficient * aggregate(kl, batch.weights),
        "entropy_loss": -settings.entropy_bonus * aggregate(entropy, batch.weights),
    }
    loss = parts["policy_loss"] + parts["kl_loss"] + parts["entropy_loss"]
    values = {name: value.detach() for name, value in parts.items()}
    values |= _position_statistics(log_ratio.detach(), gap, entropy.detach(), kl.detach(), mask, batch, settings)
    values |= _soft_statistics(batch, settings)
    values["importance_weight"] = torch.where(mask, correction, 0.0).sum()
    return loss, Statistics.of(values)


def _rows_by_kind(batch: ReplayBatch) -> tuple[Tensor, Tensor]:
    """Indices into the N scored positions: soft ones [S], and the rest [N - S]."""
    is_soft = batch.kinds == Kind.SOFT
    return is_soft.nonzero().squeeze(-1), (~is_soft).nonzero().squeeze(-1)


def _score(
    hidden: Tensor,
    weight: Tensor,
    batch: ReplayBatch,
    soft: Tensor,
    other: Tensor,
    support: Tensor,
    with_entropy: bool,
    gather: Gather | None,
) -> _Scores:
    logits = candidate_logits(hidden[soft], weight, batch.candidate_ids, gather=gather)
    logits = logits / batch.temperature[soft].to(logits.dtype).unsqueeze(-1)
    at_ids, log_normaliser, *entropy = linear_lse_gather(
        hidden[other],
        weight,
        batch.ids[other].unsqueeze(-1),
        temperature=batch.temperature[other],
        entropy=with_entropy,
        gather=gather,
    )
    other_entropy = entropy[0] if entropy else torch.zeros_like(log_normaliser)
    return _Scores(
        candidate_logits=logits,
        log_prob=at_ids.squeeze(-1) - log_normaliser,
        entropy=_spread(batch, soft, candidate_entropy(logits, support), other, other_entropy),
    )


def _spread(batch: ReplayBatch, soft: Tensor, at_soft: Tensor, other: Tensor, at_other: Tensor) -> Tensor:
    """One value per scored position [N] from values at the soft [S] and at the other positions [N - S]."""
    values = at_other.new_zeros(batch.rows.shape[0])
    return values.index_copy(0, soft, at_soft.to(values.dtype)).index_copy(0, other, at_other)


def _log_ratio(
    logits: Tensor,
    log_prob: Tensor,
    base: ScoredLogits,
    batch: ReplayBatch,
    settings: ObjectiveSettings,
    soft: Tensor,
    other: Tensor,
) -> Tensor:
    """log p / p_base [N]: density ratio of the stored noise at soft positions, of the emitted token elsewhere."""
    if settings.likelihood == "none":
        at_soft = logits.new_zeros(soft.shape[0])
    else:
        at_soft = soft_log_ratio(
            logits,
            base.candidate_logits,
            batch.perturbed,
            batch.retained,
            likelihood=settings.likelihood,
            noise_scale=settings.noise_scale,
            threshold=batch.threshold,
            noise=settings.noise,
        )
    return _spread(batch, soft, at_soft, other, log_prob - base.log_prob[other].to(log_prob.dtype))


def _reference_kl(
    new: _Scores,
    hidden: Tensor,
    weight: Tensor,
    batch: ReplayBatch,
    settings: ObjectiveSettings,
    soft: Tensor,
    other: Tensor,
    support: Tensor,
    reference_weight: Tensor | None,
    gather: Gather | None,
) -> Tensor:
    """KL(policy || reference) [N], exact or estimated at the sample."""
    reference = batch.reference
    if reference is None:
        raise ValueError(f"kl_coefficient={settings.kl_coefficient} needs ReplayBatch.reference")
    keeps = settings.keeps_states
    if keeps == "none":
        log_ratio = _log_ratio(new.candidate_logits, new.log_prob, reference, batch, settings, soft, other)
        return sampled_kl(log_ratio, estimator=settings.kl_estimator)
    if keeps == "all":
        return _vocabulary_kl(hidden, weight, reference.hidden, reference_weight, batch.temperature, gather)
    at_soft = candidate_kl(new.candidate_logits, reference.candidate_logits, support)
    temperature = batch.temperature[other]
    at_other = _vocabulary_kl(hidden[other], weight, reference.hidden, reference_weight, temperature, gather)
    return _spread(batch, soft, at_soft, other, at_other)


def _vocabulary_kl(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
    temperature: Tensor,
    gather: Gather | None,
) -> Tensor:
    """Exact KL [T] over the vocabulary, also where T is 0 and there is no reference to compare with."""
    if not hidden.shape[0]:
        return temperature.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
    if reference_hidden is None or reference_weight is None:
        raise ValueError("exact KL needs the reference's hidden states (keep) and head weight")
    states = (hidden, weight, reference_hidden, reference_weight)
    return linear_kl(*states, temperature=temperature, gather=gather)


def _position_statistics(
    log_ratio: Tensor,
    gap: Tensor,
    entropy: Tensor,
    kl: Tensor,
    mask: Tensor,
    batch: ReplayBatch,
    settings: ObjectiveSettings,
) -> dict[str, Tensor]:
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    judged = ratio
    if settings.policy_loss == "gspo":
        judged = sequence_log_ratio(log_ratio, mask, batch.sequence).exp()
    advantages = batch.advantages
    too_high = (advantages > 0) & (judged > 1 + settings.clip_high)
    too_low = (advantages < 0) & (judged < 1 - settings.clip_low)
    weight = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    per_position = {
        "count": torch.ones_like(ratio),
        "clipped": (too_high | too_low).to(ratio.dtype),
        "ratio": ratio,
        "ratio_squared": ratio**2,
        "entropy": entropy,
        "kl": kl,
        "gap": gap,
        "gap_kl": weight - 1 - gap,
        "weight": weight,
        "weight_squared": weight**2,
    }
    answer = batch.kinds == Kind.DISCRETE
    values: dict[str, Tensor] = {}
    for part, members in (("thinking", ~answer & mask), ("answer", answer & mask)):
        for name, value in per_position.items():
            values[f"{part}/{name}"] = torch.where(members, value, 0.0).sum(dtype=torch.float64)
        values[f"{part}/gap_max"] = _largest(torch.where(members, gap.abs(), 0.0))
    values["ratio_max"] = _largest(torch.where(mask, ratio, 0.0))
    return values


def _soft_statistics(batch: ReplayBatch, settings: ObjectiveSettings) -> dict[str, Tensor]:
    """Of the executed mixtures: how many candidates are in one, the weight of the first, how many have just one."""
    active = batch.retained
    if settings.likelihood == "censored":
        active = active & ~(batch.perturbed < batch.threshold.unsqueeze(-1))
    top_weight = torch.zeros_like(batch.threshold) if batch.top_weight is None else batch.top_weight
    return {
        "soft_count": torch.ones_like(batch.threshold).sum(),
        "active_candidates": active.sum(),
        "top_weight": top_weight.sum(),
        "single_candidate": (batch.retained.sum(-1) == 1).sum(),
    }


def _largest(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())
