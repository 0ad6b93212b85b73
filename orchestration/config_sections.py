"""The sections of the configuration: every key, its type, its bounds, its default and what it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from rollout.engine_spec import MIN_ANSWER_TEMPERATURE


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise ValueError("actors share one GPU (a number below 1) or have whole ones; round it")
    return gpus


def _as_drawn(temperature: float) -> float:
    if 0 < temperature < MIN_ANSWER_TEMPERATURE:
        raise ValueError(f"vLLM would draw at {MIN_ANSWER_TEMPERATURE}; give 0 (greedy) or at least that")
    return temperature


Fraction = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]
"""Bounded by what a wait of the operating system takes: thirty years."""
Gpus = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)]
AnswerTemperature = Annotated[float, Field(ge=0), AfterValidator(_as_drawn)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys; a number that YAML reads as text (`1e-3`) is a number.

    Infinities, NaN and truth values are no numbers of a recipe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def refuse_truth_values_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """`steps: yes` would be one step."""
        parts = value if isinstance(value, list | tuple) else [value]
        annotation = cls.model_fields[str(info.field_name)].annotation
        if any(isinstance(part, bool) for part in parts) and _is_number(annotation):
            raise ValueError("expected a number, found a truth value")
        return value


def _is_number(annotation: Any) -> bool:
    """Whether a type is of integers or floats, alone or in a tuple, a union or a `Literal`."""
    if annotation in (int, float) or isinstance(annotation, int):
        return True
    return any(_is_number(part) for part in get_args(annotation))


class ModelConfig(Section):
    """The policy's starting point."""

    path: str
    """Local directory or hub name of a Hugging Face checkpoint (safetensors)."""
    end_of_thinking: str | int = "</think>"
    """Token or token id that ends thinking; a string must be exactly one token."""
    add_end_of_thinking: bool = False
    """Have training add `end_of_thinking` to the tokenizer and resize the embeddings (for models without such a token).
    Everything else needs the model that training exported."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute and rollout type; the learner keeps fp32 master weights."""
    trust_remote_code: bool = False


class ColumnMapping(Section):
    """Where a dataset keeps its fields, when detection does not fit."""

    prompt: str
    """Column with a string or a chat list."""
    answer: str
    """Column with the gold answer; dots reach into structs (`reward_model.ground_truth`)."""
    data_source: str | None = None


class DatasetConfig(Section):
    """One dataset file."""

    path: str
    """Parquet, JSON or JSONL."""
    name: str | None = None
    """Defaults to the file's stem; the data_source of rows that carry none."""
    columns: ColumnMapping | None = None
    """None detects the layout."""
    rule: str | None = None
    """Name of a reward rule for all rows; None looks the data source up in `reward.rules`."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows."""


class DataConfig(Section):
    """Prompts."""

    train: DatasetConfig
    evaluation: tuple[DatasetConfig, ...] = ()
    prompt_suffix: str = ""
    """Appended to the last user message."""
    system_prompt: str | None = None
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 1024
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    """Rows without prompt or checkable answer, or over `max_prompt_tokens`, that may be skipped (each is listed)."""


class AnswerSampling(Section):
    """Sampling of discrete tokens: the answer, and everything when `thinking: discrete`."""

    temperature: AnswerTemperature = 1.0
    top_p: Fraction = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    """-1 keeps all."""


class SamplingConfig(Section):
    """How responses are generated; the fields of a soft token have the names of `SoftTokenParams`."""

    thinking: Literal["soft", "discrete"] = "soft"
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=1, le=64)] = 5
    top_p: Fraction = 0.95
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gumbel_temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of the mixture's weights with `gumbel` noise; with any other they are what was drawn, normalised."""
    noise: Literal["gumbel", "gaussian", "dirichlet", "none"] = "gumbel"
    noise_scale: Annotated[float, Field(gt=0)] = 1.0
    """Of `gumbel` and `gaussian` noise; `dirichlet` has none."""
    noise_clip: tuple[float, float] | None = None
    """[low, high] of every draw, as in the released code; only likelihood `reference` scores that."""
    log_epsilon: Annotated[float, Field(ge=0)] = 0.0
    """Added inside the logarithm, as in the released code: candidates that were filtered out enter the mixture. Only
    likelihood `reference` scores that."""
    censor_delta: Annotated[float, Field(gt=0, le=1)] | None = None
    """Set to 1e-3 exactly when the likelihood is `censored`; give it only to change that value."""
    answer: AnswerSampling = AnswerSampling()
    max_new_tokens: Annotated[int, Field(ge=1)] = 8192
    max_thinking_tokens: Annotated[int, Field(ge=1)] | None = None
    """Budget after which the end of thinking is forced; None lets thinking use all of `max_new_tokens`. Of soft
    thinking, like the next three: to `thinking: discrete` all tokens are alike."""
    eos_while_thinking: Literal["stop", "forbid"] = "stop"
    entropy_stop: Annotated[float, Field(gt=0)] | None = None
    """Nats: the end of thinking is forced after `entropy_stop_steps` soft tokens in a row with less entropy; None never
    does."""
    entropy_stop_steps: Annotated[int, Field(ge=1)] = 16


class RolloutConfig(Section):
    """The vLLM actor pool."""

    num_actors: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(gt=0)] = 1.0
    """Ray CPUs per actor."""
    num_gpus: Gpus = 0.0
    """Ray GPUs per actor; tensor_parallel_size GPUs are used when > 0."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    max_num_seqs: Annotated[int, Field(ge=1)] = 128
    """Requests that one engine decodes together."""
    max_num_batched_tokens: Annotated[int, Field(ge=16)] = 2048
    kv_cache_memory_mb: Annotated[int, Field(ge=1)] | None = None
    """Given, it decides instead of `gpu_memory_utilization`. None lets vLLM profile a GPU; on a CPU it is 512 MiB."""
    gpu_memory_utilization: Fraction = 0.85
    """The engine's share of the memory of its GPU."""
    enforce_eager: bool = False
    """No compiled graphs; a CPU never has them."""
    request_timeout_s: Seconds = 1800.0
    """A group that takes half of it moves with its tokens to another actor that has room; where it could not and takes
    longer, its actor is replaced and it starts again. A verifier with answers to grade and no progress for as long is
    replaced too."""
    startup_timeout_s: Seconds = 600.0
    """Of an actor of this pool, and of a verifier."""


class RewardConfig(Section):
    """The verifier actor pool and its rules."""

    num_actors: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(ge=0)] = 0.5
    processes_per_actor: Annotated[int, Field(ge=1)] = 1
    """Killable grader children per actor."""
    deadline_s: Seconds = 5.0
    """Per answer; the child is killed after it."""
    memory_mb: Annotated[int, Field(ge=128)] = 2048
    """Address space of one child."""
    rules: dict[str, str] = {}
    """data_source -> rule; `default` is used for the rest (math when absent)."""
    on_failure: Literal["incorrect", "mask"] = "incorrect"
    """What a timeout, crash or out-of-memory verdict does to its sample: reward 0, or leave it out of the group."""
    failure_alarm: Fraction = 0.2
    """A batch with a larger share of failed verdicts is not trained; a few in a row end the run. 1 trains all."""
    user_rule: str | None = None
    """`module:function` of the user's own rule, usable under the rule name `user`."""


class KLConfig(Section):
    """Penalty towards the frozen reference policy."""

    coefficient: Annotated[float, Field(ge=0)] = 0.001
    estimator: Literal["exact", "exact_vocabulary", "k1", "k2", "k3"] = "k3"
    """Exact over the candidates of a soft token and over the vocabulary elsewhere; over the vocabulary everywhere; or
    estimated from the sample."""
    refresh_every: Annotated[int, Field(ge=1)] | None = None
    """Copy the policy into the reference every so many steps."""


class AlgorithmConfig(Section):
    """The objective."""

    likelihood: Literal["reference", "gumbel", "concrete", "censored", "argmax", "gaussian", "dirichlet", "none"] = (
        "censored"
    )
    """`none` leaves soft positions out of the loss (control)."""
    old_log_density: Literal["recompute", "behaviour"] = "recompute"
    group_size: Annotated[int, Field(ge=2)] = 8
    prompts_per_step: Annotated[int, Field(ge=1)] = 64
    """Groups per training step (the batch)."""
    mini_batches: Annotated[int, Field(ge=1)] = 1
    """Optimiser steps per training step."""
    epochs: Annotated[int, Field(ge=1)] = 1
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce", "bnpo"] = "grpo"
    policy_loss: Literal["ppo", "sapo", "cispo", "gspo"] = "ppo"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio counts from 1 - `clip_low` to 1 + `clip_high`; `sapo` clips nothing."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Largest ratio of a negative advantage, of `ppo` and `gspo`; None is off."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    importance_cap: Annotated[float, Field(gt=1)] | None = None
    """Truncated importance correction between behaviour and learner; None is off."""
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    kl: KLConfig = KLConfig()


class LearnerConfig(Section):
    """The DeepSpeed learner group."""

    world_size: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(gt=0)] = 1.0
    """Ray CPUs per rank."""
    num_gpus: Gpus = 0.0
    """Ray GPUs per rank."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """In bfloat16, and with `offload_optimizer`, 0 is 1, which has what these need and changes nothing else."""
    offload_optimizer: bool = False
    gradient_checkpointing: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    micro_batch_tokens: Annotated[int, Field(ge=16)] = 16384
    """Token budget of one packed forward pass; a longer sequence gets a pass of its own."""
    differentiate_soft_inputs: bool = False
    """The embedding table learns from the mixtures too; with `lora_rank` it is frozen, and nothing changes."""
    lora_rank: Annotated[int, Field(ge=1)] | None = None
    collective_timeout_s: Seconds = 600.0
    """Of one collective of the ranks, those of gradients and ZeRO included; all wait for the last to load the model."""
    startup_timeout_s: Seconds = 600.0
    step_timeout_s: Seconds = 3600.0


class PipelineConfig(Section):
    """Asynchrony and weight sync."""

    max_staleness: Annotated[int, Field(ge=0)] = 2
    """Versions between the oldest token of a trained trajectory and the policy it trains; 0 is synchronous."""
    transport: Literal["object_store", "delta", "nccl"] = "object_store"
    """delta sends only the bytes that changed (lossless; worth it between nodes on a slow network); nccl broadcasts
    from GPU to GPU besides (learner and rollout actors need whole GPUs)."""
    shard_mb: Annotated[int, Field(ge=1, le=256)] = 256
    sync_timeout_s: Seconds = 600.0
    group_deadline_s: Seconds = 3600.0
    """How long the learner waits for a group that would grow too old before the oldest in flight is dropped and issued
    again; also how long a run may have no group in flight before it ends."""
    max_restarts: Annotated[int, Field(ge=0)] = 10
    """Replacements of dead actors per pool and run."""


class CheckpointConfig(Section):
    """Resumable state."""

    every_steps: Annotated[int, Field(ge=1)] = 50
    keep_last: Annotated[int, Field(ge=1)] = 2
    stop_grace_s: Seconds = 10.0
    """Time for the last checkpoint after a stop signal."""


class EvaluationConfig(Section):
    """Evaluation on `data.evaluation` during training."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Also beside training, every so many steps; 0 does not."""
    before_and_after: bool = True
    """The two evaluations that make `summary.json`."""
    samples: Annotated[int, Field(ge=1)] = 16
    """Responses per question (`softgrpo evaluate` has --samples of its own)."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Questions per dataset, the first ones; also of `softgrpo evaluate`."""


class TrackingConfig(Section):
    """MLflow mirror; metrics.jsonl in the run directory is the truth."""

    mlflow: bool = True
    """False keeps metrics.jsonl only."""
    mlflow_uri: str | None = None
    """None: MLFLOW_TRACKING_URI, or sqlite in the run directory's parent."""
    experiment: str = "softgrpo"
    registered_model: str | None = None
    """Name under which the exported model is registered in MLflow (by path, not by upload) when the run is done;
    nothing is registered where `mlflow` is false."""
    trajectories_every: Annotated[int, Field(ge=0)] = 10
    """Steps between saved trajectory samples; 0 is off."""


class ClusterConfig(Section):
    """Ray."""

    address: str | None = None
    """None: the job's cluster if there is one (RAY_ADDRESS), otherwise a local one."""
    local_cpus: Annotated[int, Field(ge=1)] | None = None
    """Logical CPUs of a local cluster; None takes what the plan needs or the machine has, whichever is more."""
    object_store_mb: Annotated[int, Field(ge=80)] = 512
    """Of a local cluster."""
    startup_timeout_s: Seconds = 120.0
    """Wait for room for all pools; give an autoscaler the minutes that its nodes need."""
