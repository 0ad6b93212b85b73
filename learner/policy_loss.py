"""Policy losses from log-ratios (pure; one function and one registry entry each)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

PolicyLoss = Literal["ppo", "sapo", "cispo", "gspo"]


def policy_loss(log_ratio: Tensor, advantage: Tensor, mask: Tensor, *, kind: PolicyLoss, **options: Any) -> Tensor:
    """Per-position loss [T] from log_ratio [T], advantage [T] and mask [T] (aggregation is separate)."""
    raise NotImplementedError
