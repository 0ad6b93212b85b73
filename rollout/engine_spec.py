"""What an engine and a request are told, and the checks of it: plain data, importable without torch and vLLM.

The driver builds the `EngineSpec`; the pool sets `engine_environment(spec)` before an actor's process imports torch.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rollout.request import RequestSettings, RolloutRequest

MAX_SEED = 2**63 - 1
MIN_ANSWER_TEMPERATURE = 0.01
"""What vLLM raises a positive temperature below it to: tokens would be drawn at another one than they are scored at."""


class RequestError(ValueError):
    """A request that this engine cannot serve; the message names the setting, its value and the fix."""


class EngineError(RuntimeError):
    """The engine cannot start or go on."""


@dataclass(frozen=True)
class EngineSpec:
    """Everything an engine needs to start: plain data, picklable."""

    model_path: str
    dtype: str = "bfloat16"
    trust_remote_code: bool = False
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    tensor_parallel_size: int = 1
    max_num_seqs: int = 128
    """Requests that decode together."""
    max_model_len: int = 2048
    """Longest prompt plus response, tokens."""
    max_num_batched_tokens: int = 2048
    kv_cache_memory_bytes: int | None = None
    """Given, it decides instead of `gpu_memory_utilization`. None lets vLLM profile a GPU; a CPU then gets 512 MiB."""
    gpu_memory_utilization: float = 0.85
    """Share of the memory of a GPU."""
    enforce_eager: bool = False
    """A CPU always is."""
    block_size: int | None = None
    """Tokens per KV block; None is vLLM's choice."""
    enable_prefix_caching: bool = True
    num_threads: int = 1
    """OpenMP threads of one engine process on a CPU."""
    end_of_thinking_id: int | None = None
    """Needed for soft requests."""
    soft: dict[str, Any] = field(default_factory=dict)
    """Fields of `SoftTokenParams`."""
    answer_temperature: float = 1.0
    answer_top_p: float = 1.0
    answer_top_k: int = -1
    max_new_tokens: int = 1024
    thinking_budget: int = 1024
    """Soft positions after which the end of thinking is forced; also the length of the per-request history."""
    eos_while_thinking: Literal["stop", "forbid"] = "stop"
    entropy_stop: float | None = None
    """Nats: the end of thinking is forced after `entropy_stop_steps` soft positions in a row whose candidates have less
    entropy; None never does. (A greedy position has none.)"""
    entropy_stop_steps: int = 16
    transport: Literal["object_store", "delta", "nccl"] = "object_store"
    """How weight updates arrive; the learner must send the same way."""
    initial_version: int = 0
    """Policy version of the checkpoint at `model_path`."""
    sleeps: bool = False
    """It shares its GPU with a learner rank and gives the memory up while that trains."""


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """Environment of a process that runs this engine; must be set before it imports torch."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: the engine is stepped by our thread
        "VLLM_USE_V2_MODEL_RUNNER": "1",  # V1 knows no model states; without Triton vLLM would choose it
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if Path(spec.model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if spec.tensor_parallel_size > 1:
        environment["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if spec.device == "cuda":
        # Our requests carry seeds, which vLLM samples without it; warming it up would compile it, with an nvcc that a
        # machine with the CUDA packages alone does not have.
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if spec.device == "cpu":
        environment |= {
            "OMP_NUM_THREADS": str(spec.num_threads),
            # "auto" pins every engine of a machine to the same first core.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_TARGET_DEVICE": "cpu",
        }
        if spec.enforce_eager:
            # enforce_eager does not cover vLLM's decorated helpers: their first batch took up to half a minute.
            environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment


def resolve_settings(spec: EngineSpec, request: RolloutRequest, settings: RequestSettings | None) -> dict[str, Any]:
    """The numbers that one request runs with (`settings` before the request's own before the engine's).

    Raises `RequestError` naming what is out of range.
    """
    defaults = {
        "temperature": spec.soft.get("temperature", 1.0),
        "top_k": spec.soft.get("top_k", 5),
        "top_p": spec.soft.get("top_p", 0.95),
        "min_p": spec.soft.get("min_p", 0.0),
        "gumbel_temperature": spec.soft.get("gumbel_temperature", 0.1),
        "noise_scale": spec.soft.get("noise_scale", 1.0),
        "thinking_budget": min(spec.thinking_budget, spec.max_new_tokens),
        "max_new_tokens": spec.max_new_tokens,
        "answer_temperature": spec.answer_temperature,
        "answer_top_p": spec.answer_top_p,
        "answer_top_k": spec.answer_top_k,
    }
    chosen = settings or request.settings or RequestSettings()
    given = {name: value for name, value in asdict(chosen).items() if value is not None}
    values = {**defaults, **given}
    problems = list(_range_problems(spec, request, values))
    if problems:
        raise RequestError(f"request {request.request_id}: " + "; ".join(problems))
    return values


def _range_problems(spec: EngineSpec, request: RolloutRequest, values: dict[str, Any]) -> list[str]:
    prompt_len, new_tokens = len(request.prompt_ids), values["max_new_tokens"]
    problems = []

    def need(holds: bool, name: str, what: str) -> None:
        if not holds:
            problems.append(f"{name}={values[name]}: {what}")

    if not prompt_len:
        problems.append("the prompt is empty")
    if not isinstance(request.seed, int) or not 0 <= request.seed <= MAX_SEED:
        problems.append(f"seed={request.seed}: needs an integer in [0, 2^63); see rollout.request.sample_seed")
    if prompt_len + new_tokens > spec.max_model_len:
        problems.append(
            f"prompt of {prompt_len} tokens plus max_new_tokens={new_tokens} exceeds max_model_len={spec.max_model_len}"
        )
    need(new_tokens >= 1, "max_new_tokens", "at least 1")
    answer_temperature = values["answer_temperature"]
    need(
        answer_temperature == 0 or MIN_ANSWER_TEMPERATURE <= answer_temperature < math.inf,
        "answer_temperature",
        f"must be 0 (greedy) or at least {MIN_ANSWER_TEMPERATURE}, below which vLLM draws at {MIN_ANSWER_TEMPERATURE}",
    )
    need(0 < values["answer_top_p"] <= 1, "answer_top_p", "must be in (0, 1]")
    need(values["answer_top_k"] >= -1, "answer_top_k", "at least 1, or -1 for all tokens")
    if request.thinking == "discrete":
        return problems
    if request.thinking != "soft":
        problems.append(f"thinking={request.thinking!r}: soft or discrete")
    if spec.end_of_thinking_id is None:
        problems.append("thinking=soft, but the engine has no end_of_thinking_id; set model.end_of_thinking")
    num_columns = spec.soft.get("max_candidates", 5)
    need(1 <= values["thinking_budget"] <= spec.thinking_budget, "thinking_budget", f"1 to {spec.thinking_budget}")
    need(1 <= values["top_k"] <= num_columns, "top_k", f"1 to max_candidates={num_columns}")
    need(0 <= values["temperature"] < math.inf, "temperature", "must be >= 0 (0 is greedy)")
    need(
        0 <= values["gumbel_temperature"] < math.inf,
        "gumbel_temperature",
        "must be >= 0 (0 is the heaviest candidate alone)",
    )
    need(0 < values["top_p"] <= 1, "top_p", "must be in (0, 1]")
    need(0 <= values["min_p"] < 1, "min_p", "must be in [0, 1)")
    need(0 <= values["noise_scale"] < math.inf, "noise_scale", "must be >= 0")
    return problems
