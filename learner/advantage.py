"""Group advantages from rewards (pure). A new estimator is one function and one entry of `ESTIMATORS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learner.spec import ReplayError

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce", "bnpo"]

STD_EPSILON = 1e-6
LEAST_VARIANCE = 1e-10
"""Of the group means, as a share of the most that they could have: below it there is rounding, of equal means."""


@dataclass(frozen=True)
class Groups:
    """Rewards [N] with the statistics of their groups, each spread over the members: [N]."""

    rewards: Tensor
    size: Tensor
    mean: Tensor
    std: Tensor
    """Unbiased (divides by size - 1); 0 in groups of one."""
    members: Tensor
    """int64 index of the group"""

    @property
    def means(self) -> Tensor:
        """[number of groups] mean reward of every group, one entry each."""
        first = self.mean.new_zeros(int(self.members.max()) + 1)
        return first.scatter(0, self.members, self.mean)


def group_advantage(rewards: Tensor, group_ids: Tensor, *, estimator: Estimator) -> Tensor:
    """rewards [N], group_ids [N] int64 -> advantages [N] fp32 (fp64 for fp64 rewards).

    0 where all rewards of a group are equal, except for `reinforce`, whose baseline is the whole batch. Pass the
    rewards of the whole batch, not of one rank: `reinforce` and `bnpo` normalise over it. Raises `ReplayError` for
    rewards that the estimator does not take.
    """
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    if rewards.numel() == 0:
        return rewards
    advantages = ESTIMATORS[estimator](_groups(rewards, group_ids))
    return advantages.to(rewards.dtype)


def _groups(rewards: Tensor, group_ids: Tensor) -> Groups:
    _, members, counts = group_ids.unique(return_inverse=True, return_counts=True)
    wide = rewards.double()  # equal rewards must have a deviation of exactly 0 and the batch order must not matter
    number = counts.numel()
    sums = torch.zeros(number, dtype=wide.dtype, device=wide.device).index_add_(0, members, wide)
    highest = torch.full_like(sums, -torch.inf).scatter_reduce_(0, members, wide, "amax")
    lowest = torch.full_like(sums, torch.inf).scatter_reduce_(0, members, wide, "amin")
    mean = torch.where(highest == lowest, highest, sums / counts)
    deviation = wide - mean[members]
    squares = torch.zeros_like(sums).index_add_(0, members, deviation**2)
    std = (squares / (counts - 1).clamp(min=1)).sqrt()
    return Groups(wide, counts[members], mean[members], std[members], members)


def _grpo(groups: Groups) -> Tensor:
    """(r - mean) / std of the group (arXiv 2402.03300)."""
    return (groups.rewards - groups.mean) / (groups.std + STD_EPSILON)


def _dr_grpo(groups: Groups) -> Tensor:
    """r - mean: without the division, easy and hard questions weigh the same (arXiv 2503.20783)."""
    return groups.rewards - groups.mean


def _rloo(groups: Groups) -> Tensor:
    """r - mean of the *other* members (arXiv 2402.14740)."""
    return (groups.rewards - groups.mean) * groups.size / (groups.size - 1).clamp(min=1)


def _reinforce(groups: Groups) -> Tensor:
    """(r - mean) / std of the whole batch, no groups (REINFORCE++, arXiv 2501.03262)."""
    deviation = groups.rewards - groups.rewards.mean()
    return deviation / (groups.rewards.std(correction=min(1, groups.rewards.numel() - 1)) + STD_EPSILON)


def _bnpo(groups: Groups) -> Tensor:
    """(r - p) / Beta(p; 1 + a/3, 1 + b/3), p the mean reward of the group (arXiv 2506.02864).

    Beta(a, b) is fitted to the group means of the batch by moments; where they have no spread, or the fit is not a
    Beta, the division is by a constant density of 1. Rewards must be in [0, 1].
    """
    if bool((groups.rewards < 0).any()) or bool((groups.rewards > 1).any()):
        raise ReplayError(
            "algorithm.advantage=bnpo models success rates, rewards must be in [0, 1] and are "
            f"{groups.rewards.min():g} to {groups.rewards.max():g}: let the weights of a rule of reward.rules sum "
            "to 1 (0.9*math + 0.1*format), or choose another advantage"
        )
    means = groups.means
    mean, variance = means.mean(), means.var(correction=0)
    spread = mean * (1 - mean)
    fits = bool(variance > LEAST_VARIANCE * spread) and bool(variance < spread)
    total = spread / variance - 1 if fits else torch.zeros_like(mean)
    alpha, beta = 1 + mean * total / 3, 1 + (1 - mean) * total / 3
    p = groups.mean.clamp(1e-6, 1 - 1e-6)  # deviations are 0 at 0 and 1: any positive density will do
    log_density = (alpha - 1) * p.log() + (beta - 1) * torch.log1p(-p)
    log_density = log_density - torch.lgamma(alpha) - torch.lgamma(beta) + torch.lgamma(alpha + beta)
    return (groups.rewards - groups.mean) / log_density.exp()


ESTIMATORS: dict[str, Callable[[Groups], Tensor]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "reinforce": _reinforce,
    "bnpo": _bnpo,
}
"""name -> f(groups) -> advantages [N]."""
