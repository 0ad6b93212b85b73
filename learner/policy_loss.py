"""Policy losses from log-ratios (pure). A new loss is one function and one entry of `POLICY_LOSSES`.

ratio r = exp(log_ratio), advantage A, per position:
ppo    max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), at most -A dual_clip where A < 0
sapo   -A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A: a soft gate with slope 1 at r = 1
cispo  -A stop_gradient(clip(r)) log_ratio: clipped weights, every position keeps its gradient
gspo   ppo on the geometric mean of the ratios of a sequence, the same value at all its positions
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

PolicyLoss = Literal["ppo", "sapo", "cispo", "gspo"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp: e^20 = 5e8 keeps products finite in fp32, and the ratio of one position is
beyond any clip range long before. Outside the clamp the gradient is 0."""


def policy_loss(log_ratio: Tensor, advantage: Tensor, mask: Tensor, *, kind: PolicyLoss, **options: Any) -> Tensor:
    """Per-position loss from log_ratio, advantage and bool mask of one shape ([T] or [B, T]); 0 outside the mask.

    Options: `clip_low`, `clip_high`, `dual_clip` (None: off) for ppo and gspo; `clip_low` (None: no lower bound),
    `clip_high` for cispo; `tau_positive`, `tau_negative` for sapo; `sequence_ids` [T] int64 for gspo ([B, T] inputs are
    one sequence per row). Aggregation is separate (`learner.aggregation`).
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, log_ratio, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantage = torch.where(mask, advantage, 0.0)
    if kind == "gspo":
        options["mask"] = mask
    return POLICY_LOSSES[kind](log_ratio, advantage, **options)


def importance_weight(log_learner: Tensor, log_behaviour: Tensor, cap: float) -> Tensor:
    """min(p_learner / p_behaviour, cap), without gradient: corrects for an engine that is not quite the old policy.

    Takes two log-densities of one shape (pass log-ratio and 0 where only the ratio is known). Truncated importance
    sampling (arXiv 1606.02647 and its use between inference and training engines).
    """
    gap = (log_learner - log_behaviour).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return gap.exp().clamp(max=cap)


def _ppo(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
) -> Tensor:
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)


def _sapo(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Tensor:
    """arXiv 2511.20347; the negative gate decays faster because negative updates raise many unlikely tokens."""
    tau = torch.where(advantage > 0, tau_positive, tau_negative)
    return -advantage * torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau


def _cispo(log_ratio: Tensor, advantage: Tensor, *, clip_low: float | None = None, clip_high: float = 0.2) -> Tensor:
    """arXiv 2506.13585; log_ratio has the gradient of the log-density."""
    lowest = None if clip_low is None else 1 - clip_low
    weight = log_ratio.detach().exp().clamp(lowest, 1 + clip_high)
    return -advantage * weight * log_ratio


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
    """The mean log-ratio of its sequence at every position; [B, T] inputs are one sequence per row."""
    if log_ratio.dim() == 2:
        sequence_ids = torch.arange(log_ratio.shape[0], device=log_ratio.device)[:, None].expand_as(log_ratio)
    elif sequence_ids is None:
        sequence_ids = torch.zeros_like(log_ratio, dtype=torch.int64)
    flat = sequence_ids.reshape(-1)
    number = int(flat.max()) + 1 if flat.numel() else 0
    sums = log_ratio.new_zeros(number).index_add(0, flat, log_ratio.reshape(-1))
    counts = log_ratio.new_zeros(number).index_add(0, flat, mask.reshape(-1).to(log_ratio.dtype))
    return (sums / counts.clamp(min=1))[sequence_ids]


def _gspo(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor,
    sequence_ids: Tensor | None = None,
    **clip: Any,
) -> Tensor:
    """arXiv 2507.18071; equals the published objective under `sequence_mean` aggregation."""
    mean = sequence_log_ratio(log_ratio, mask, sequence_ids)
    return torch.where(mask, _ppo(mean, advantage, **clip), 0.0)


POLICY_LOSSES: dict[str, Callable[..., Tensor]] = {"ppo": _ppo, "sapo": _sapo, "cispo": _cispo, "gspo": _gspo}
"""name -> f(clamped log-ratio, advantage, **options) -> per-position loss."""
