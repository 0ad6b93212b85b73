"""AdamW, learning rates and the DeepSpeed configuration of a learner rank.

DeepSpeed owns gradient reduction, partitioning, clipping and master weights. Gradients arrive already normalised over
all ranks of the mini-batch (the loss is divided by global counts), so that DeepSpeed's mean over ranks is undone by
multiplying the loss with the world size, and its division by accumulation steps is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from learner.spec import LearnerSpec

ADAM_EPSILON = 1e-8
BUCKET_ELEMENTS = 50_000_000
"""Elements per reduction bucket of ZeRO 1-3: 200 MB of fp32 gradients."""


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm, and skips a step whose gradients are not finite.

    DeepSpeed's ZeRO optimisers do both themselves; without ZeRO it neither skips nor reports a norm. The two
    attributes are those it reads from an optimiser after `step`. Gradients must already be equal on all ranks.
    """

    def __init__(self, parameters: Iterable[Any], *, max_grad_norm: float, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.max_grad_norm = max_grad_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One guarded update; sets `overflow` and the gradient norm before clipping."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self._global_grad_norm = norm.item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow:
            super().step(closure)


def effective_zero_stage(spec: LearnerSpec) -> int:
    """DeepSpeed without ZeRO keeps no fp32 master weights in bf16; stage 1 does, and changes nothing else."""
    return max(spec.zero_stage, 1) if spec.dtype == "bfloat16" or spec.offload_optimizer else spec.zero_stage


def learning_rate(spec: LearnerSpec, step: int) -> float:
    """The rate of training step `step` (from 0); a function of the step, so that resuming is exact."""
    warm = min(1.0, (step + 1) / spec.warmup_steps) if spec.warmup_steps else 1.0
    span = max(1, spec.total_steps - spec.warmup_steps)
    progress = min(1.0, max(0, step - spec.warmup_steps) / span)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[spec.lr_schedule]
    return spec.learning_rate * warm * decay


def build_optimizer(model: nn.Module, spec: LearnerSpec) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; vectors (norms, biases) are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if _rank_of(p) >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trainable if _rank_of(p) < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": spec.learning_rate, "betas": spec.betas, "eps": ADAM_EPSILON}
    if effective_zero_stage(spec) == 0:
        return GuardedAdamW(groups, max_grad_norm=spec.max_grad_norm, **options)
    return torch.optim.AdamW(groups, **options)


def deepspeed_config(spec: LearnerSpec) -> dict[str, Any]:
    """The configuration of `deepspeed.initialize`; the caller owns the accumulation boundary (one `step` call)."""
    stage = effective_zero_stage(spec)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": spec.max_grad_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            # Below stage 2 gradients are reduced in `step` only: there is no backward pass to overlap with, and
            # DeepSpeed refuses to start. At stage 2 it frees the gradient of a parameter larger than a bucket on ranks
            # that own no part of it while its copy on another stream may still be under way.
            "overlap_comm": spec.device == "cuda" and stage == 3,
        },
        "checkpoint": {"tag_validation": "Fail"},
    }
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = spec.zero3_persistent_elements
    if spec.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": spec.device == "cuda"}
    if spec.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _rank_of(parameter: torch.Tensor) -> int:
    # Under ZeRO-3 the tensor itself is an empty shard; its shape is kept aside.
    return len(getattr(parameter, "ds_shape", parameter.shape))
