"""Group advantages from rewards (pure)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce", "bnpo"]


def group_advantage(rewards: Tensor, group_ids: Tensor, *, estimator: Estimator) -> Tensor:
    """rewards [N] fp32, group_ids [N] int64 -> advantages [N] fp32; 0 where all rewards of a group are equal."""
    raise NotImplementedError
