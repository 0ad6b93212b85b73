"""What the driver tells a learner and what it gets back: plain data, importable without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rollout.weights import MAX_SHARD_BYTES, WeightManifest

if TYPE_CHECKING:
    import pyarrow as pa
    from ray import ObjectRef

    from rollout.transport import Link


class LearnerError(RuntimeError):
    """The learner group cannot go on; the message names the rank and the phase."""


class Refused(ValueError):
    """All ranks declined a call alike and are as before it: the group stays alive, nothing was counted."""


class ReplayError(Refused):
    """A training step that cannot be made of the given groups (none left, or rewards that fit no row or estimator)."""

    outcome = "replay"
    """Under which its groups are counted as failed."""


class NonFiniteGradients(ReplayError):
    """Every optimiser step of the batch was skipped: its loss or gradients have a NaN or an infinity."""

    outcome = "not finite"


class CheckpointNotWritten(Refused):
    """The disk did not take a checkpoint; the one before stays what it was."""


class BatchesLost(RuntimeError):
    """Batches are gone with the nodes that held them; the step was not begun, every rank is as before."""

    def __init__(self, group_ids: Sequence[str]) -> None:
        super().__init__(f"the batches of {len(group_ids)} groups were lost: {', '.join(group_ids)}")
        self.group_ids = tuple(group_ids)


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """Everything a learner rank needs to know; times in seconds, sizes in bytes.

    The defaults are those of the configuration; a field's meaning is documented there under the same name.
    """

    model_path: str
    total_steps: int
    """Training steps of the whole run: the horizon of the learning-rate schedule."""
    world_size: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False
    expected_vocab_size: int | None = None
    """Rows of the embedding that the rollout engine and tokenizer use; None skips the check."""
    seed: int = 0

    zero_stage: Literal[0, 1, 2, 3] = 0
    zero3_persistent_elements: int = 100_000
    """Under ZeRO-3, parameters of at most so many elements stay whole on every rank (DeepSpeed's default)."""
    offload_optimizer: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int | None = None

    learning_rate: float = 1e-6
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    """Training steps (not optimiser steps) of linear warm-up."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0

    shares_device: bool = False
    """With an engine that sleeps while this rank trains: memory that is not in use goes back after every step."""
    micro_batch_tokens: int = 16384
    mini_batches: int = 1
    epochs: int = 1

    likelihood: str = "censored"
    old_log_density: Literal["recompute", "behaviour"] = "recompute"
    advantage: str = "grpo"
    policy_loss: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    aggregation: str = "token_mean"
    importance_cap: float | None = None
    entropy_bonus: float = 0.0
    max_new_tokens: int = 8192
    """Longest response: the constant of `aggregation: constant`, and a bound on what is accepted."""
    differentiate_soft_inputs: bool = False
    """Lets the embedding table learn from the mixtures too; with `lora_rank` it is frozen, and nothing changes."""

    kl_coefficient: float = 0.001
    kl_estimator: str = "k3"
    kl_refresh_every: int | None = None

    temperature: float = 1.0
    """Of soft and end-of-thinking positions; positive where there are any."""
    answer_temperature: float = 1.0
    """Of discrete positions; positive."""
    noise: str = "gumbel"
    noise_scale: float = 1.0
    noise_clip: tuple[float, float] | None = None
    log_epsilon: float = 0.0
    gumbel_temperature: float = 0.1
    censor_delta: float | None = None
    max_candidates: int = 5

    transport: Literal["object_store", "delta", "nccl"] = "object_store"
    shard_bytes: int = MAX_SHARD_BYTES
    collective_timeout_s: float = 600.0
    startup_timeout_s: float = 600.0
    step_timeout_s: float = 3600.0
    sync_timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """One complete group: the responses to one prompt with their rewards, one per row of the batch."""

    group_id: str
    batch: ObjectRef | pa.RecordBatch
    rewards: tuple[float, ...]
    keep: tuple[bool, ...]
    """False leaves a row out of the group: it neither trains nor enters the group's statistics."""


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """One policy version in the object store, owned by the driver."""

    manifest: WeightManifest
    shards: tuple[ObjectRef, ...]
    """The parts of `links`, one after another: with `object_store` the shards of the manifest."""
    links: tuple[Link, ...] = ()
    """For receivers of `rollout.transport`: the newest anchor and what came after it."""
