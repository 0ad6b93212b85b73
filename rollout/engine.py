"""The rollout engine: an in-process vLLM engine that thinks in soft tokens, stepped by one thread.

    add(request) --> vLLM scheduler --> step() --> rows of payload per request (numpy) --> finished Trajectory
    load_weights(manifest, shards)  between two steps; running requests go on, their new positions carry its version

`EngineSpec` and `engine_environment` are importable without torch and vLLM: the driver builds the one, and the pool
sets the other before the actor's process imports torch.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rollout.payload import Recording
from rollout.request import RequestSettings, RolloutRequest
from rollout.trajectory import Kind, Trajectory

if TYPE_CHECKING:
    from rollout.weights import WeightManifest

_logger = logging.getLogger(__name__)

MAX_SEED = 2**63 - 1


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
    """None lets vLLM profile the device."""
    gpu_memory_utilization: float = 0.85
    enforce_eager: bool = False
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
    initial_version: int = 0
    """Policy version of the checkpoint at `model_path`."""


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
    if request.seed is None or not 0 <= request.seed <= MAX_SEED:
        problems.append(f"seed={request.seed}: needs an integer in [0, 2^63); see rollout.request.sample_seed")
    if prompt_len + new_tokens > spec.max_model_len:
        problems.append(
            f"prompt of {prompt_len} tokens plus max_new_tokens={new_tokens} exceeds max_model_len={spec.max_model_len}"
        )
    need(new_tokens >= 1, "max_new_tokens", "at least 1")
    need(values["answer_temperature"] >= 0, "answer_temperature", "must be >= 0 (0 is greedy)")
    need(0 < values["answer_top_p"] <= 1, "answer_top_p", "must be in (0, 1]")
    if request.thinking == "discrete":
        return problems
    if spec.end_of_thinking_id is None:
        problems.append("thinking=soft, but the engine has no end_of_thinking_id; set model.end_of_thinking")
    num_columns = spec.soft.get("max_candidates", 5)
    need(1 <= values["thinking_budget"] <= spec.thinking_budget, "thinking_budget", f"1 to {spec.thinking_budget}")
    need(1 <= values["top_k"] <= num_columns, "top_k", f"1 to max_candidates={num_columns}")
    need(values["temperature"] >= 0, "temperature", "must be >= 0 (0 is greedy)")
    need(values["gumbel_temperature"] > 0, "gumbel_temperature", "must be > 0")
    need(0 < values["top_p"] <= 1, "top_p", "must be in (0, 1]")
    need(0 <= values["min_p"] < 1, "min_p", "must be in [0, 1)")
    need(values["noise_scale"] >= 0, "noise_scale", "must be >= 0")
    return problems


class SoftEngine:
    """One vLLM engine. Not thread-safe: one thread builds, feeds and steps it."""

    def __init__(self, spec: EngineSpec) -> None:
        _set_environment(spec)
        from transformers import AutoConfig, AutoTokenizer

        from rollout.soft_token import SoftTokenParams

        self.spec = spec
        self.params = SoftTokenParams(**spec.soft)
        self.version = spec.initial_version
        self.num_steps = 0
        self.num_tokens = 0
        self.num_prompt_tokens = 0
        self.num_cached_prompt_tokens = 0
        """Of which the prefix cache had the KV."""
        self.model_config = AutoConfig.from_pretrained(spec.model_path, trust_remote_code=spec.trust_remote_code)
        self.tokenizer = AutoTokenizer.from_pretrained(spec.model_path, trust_remote_code=spec.trust_remote_code)
        self.stop_ids = stop_token_ids(spec.model_path, self.model_config, self.tokenizer)
        self._check_vocabulary()
        self._recordings: dict[str, Recording] = {}
        """By vLLM's internal request id."""
        self._internal: dict[str, str] = {}
        """Our request id -> vLLM's."""
        self._llm = self._start()
        self._core = self._llm.engine_core
        self._scheduler = self._core.engine_core.scheduler
        self._tasks = self._llm.get_supported_tasks()
        self._check_soft_path()

    def _check_vocabulary(self) -> None:
        vocabulary = self.model_config.get_text_config().vocab_size
        if len(self.tokenizer) > vocabulary:
            raise EngineError(
                f"{self.spec.model_path}: the tokenizer has {len(self.tokenizer)} tokens but the model only "
                f"{vocabulary} embeddings; resize the model (model.add_end_of_thinking does) or use its own tokenizer"
            )
        end = self.spec.end_of_thinking_id
        if end is not None and not 0 <= end < vocabulary:
            raise EngineError(f"end_of_thinking_id={end} is outside the vocabulary of {vocabulary}")

    def _start(self) -> Any:
        from rollout import vllm_soft

        architecture = (self.model_config.architectures or ["none"])[0]
        if architecture not in vllm_soft.ARCHITECTURES:
            known = ", ".join(sorted(vllm_soft.ARCHITECTURES))
            raise EngineError(f"{self.spec.model_path}: architecture {architecture} is not supported; known: {known}")
        from rollout import cpu_kernels

        cpu_kernels.install()
        vllm_soft.probe_seams()
        vllm_soft.register_classes()
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        # vLLM collects garbage ten times while it starts; what the imports left behind need not be walked every time.
        gc.collect()
        gc.freeze()
        return LLMEngine.from_engine_args(EngineArgs(**self._engine_arguments(architecture)))

    def _engine_arguments(self, architecture: str) -> dict[str, Any]:
        from rollout import vllm_soft

        spec, params = self.spec, self.params
        on_cpu = spec.device == "cpu"
        optional: dict[str, Any] = {}
        if spec.block_size is not None:
            optional["block_size"] = spec.block_size
        settings = {
            "max_candidates": params.max_candidates,
            "max_thinking": spec.thinking_budget,
            "end_of_thinking_id": -1 if spec.end_of_thinking_id is None else spec.end_of_thinking_id,
            "noise": params.noise,
            "noise_clip": params.noise_clip,
            "censor_delta": params.censor_delta,
            "log_epsilon": params.log_epsilon,
            "forbidden_while_thinking": self.stop_ids if spec.eos_while_thinking == "forbid" else (),
            "initial_version": spec.initial_version,
        }
        return {
            "model": spec.model_path,
            "dtype": spec.dtype,
            "trust_remote_code": spec.trust_remote_code,
            "seed": spec.seed,
            "tensor_parallel_size": spec.tensor_parallel_size,
            "max_num_seqs": spec.max_num_seqs,
            "max_model_len": spec.max_model_len,
            "max_num_batched_tokens": max(spec.max_num_batched_tokens, spec.max_num_seqs),
            "kv_cache_memory_bytes": spec.kv_cache_memory_bytes,
            "gpu_memory_utilization": spec.gpu_memory_utilization,
            "enforce_eager": spec.enforce_eager or on_cpu,
            "enable_prefix_caching": spec.enable_prefix_caching,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "hf_overrides": {"architectures": [vllm_soft.soft_architecture(architecture)]},
            "worker_cls": "rollout.vllm_worker.SoftWorker",
            "scheduler_cls": f"rollout.vllm_scheduler.{'SoftScheduler' if on_cpu else 'SoftAsyncScheduler'}",
            "additional_config": {vllm_soft.CONFIG_KEY: settings},
            **optional,
        }

    def _check_soft_path(self) -> None:
        """Three tokens through the whole path: a fall-back to discrete rollouts must never go unnoticed."""
        if self.spec.end_of_thinking_id is None:
            return
        probe = RolloutRequest("start-up probe", "", "", 0, 0, (0,))
        self.add(probe, settings=RequestSettings(max_new_tokens=min(3, self.spec.max_new_tokens)))
        for _ in range(16):
            for trajectory in self.step():
                if trajectory.kinds[0] == Kind.DISCRETE:
                    raise EngineError("a soft request came back with discrete tokens: the soft path is not active")
                return
        raise EngineError("the start-up probe of 3 tokens did not finish in 16 engine steps")

    # --- requests -------------------------------------------------------------------------------------------------

    def add(
        self,
        request: RolloutRequest,
        *,
        prefix: Trajectory | None = None,
        settings: RequestSettings | None = None,
    ) -> None:
        """Queue one request; with `prefix`, a recorded trajectory of the same request goes on where it stopped.

        Raises `RequestError`; other requests are not affected.
        """
        values = resolve_settings(self.spec, request, settings)
        if request.request_id in self._internal:
            raise RequestError(f"request {request.request_id} is already running")
        recording = Recording(request, replace(self.params, noise_scale=values["noise_scale"]), prefix)
        self._check_prefix(request, prefix, values)
        self._check_ids(request)
        prompt = [*request.prompt_ids, *recording.prefix_ids]
        engine_input = self._llm.input_processor.process_inputs(
            request.request_id,
            {"prompt_token_ids": prompt},
            self._sampling_params(request, values, recording, prefix),
            supported_tasks=self._tasks,
        )
        self._llm.input_processor.assign_request_id(engine_input)
        internal = engine_input.request_id
        self._recordings[internal] = recording
        self._internal[request.request_id] = internal
        self._core.add_request(engine_input)

    def _check_ids(self, request: RolloutRequest) -> None:
        vocabulary = self.model_config.get_text_config().vocab_size
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocabulary:
            raise RequestError(f"request {request.request_id}: a prompt id is outside the vocabulary of {vocabulary}")

    def _check_prefix(self, request: RolloutRequest, prefix: Trajectory | None, values: dict[str, Any]) -> None:
        if prefix is None:
            return
        if tuple(prefix.prompt_ids) != request.prompt_ids or prefix.seed != request.seed:
            raise RequestError(f"request {request.request_id}: the prefix has another prompt or seed")
        if len(prefix.response_ids) >= values["max_new_tokens"]:
            raise RequestError(
                f"request {request.request_id}: a prefix of {len(prefix.response_ids)} tokens leaves nothing of "
                f"max_new_tokens={values['max_new_tokens']}"
            )

    def _sampling_params(
        self, request: RolloutRequest, values: dict[str, Any], recording: Recording, prefix: Trajectory | None
    ) -> Any:
        from vllm import SamplingParams

        from rollout.vllm_soft import REQUEST_KEY

        ours: dict[str, Any] = {"soft": request.thinking == "soft"}
        if ours["soft"]:
            ours |= {
                "seed": request.seed,
                "prompt_len": len(request.prompt_ids),
                "budget": values["thinking_budget"],
                **{name: values[name] for name in ("top_k", "temperature", "top_p", "min_p")},
                **{name: float(values[name]) for name in ("gumbel_temperature", "noise_scale")},
            }
            if prefix is not None:
                ours |= {
                    "history_positions": len(prefix.response_ids),
                    "history_ids": prefix.candidate_ids,
                    "history_weights": prefix.weights,
                }
        return SamplingParams(
            temperature=values["answer_temperature"],
            top_p=values["answer_top_p"],
            top_k=values["answer_top_k"],
            max_tokens=values["max_new_tokens"] - len(recording.prefix_ids),
            stop_token_ids=list(self.stop_ids),
            seed=request.seed,
            logprobs=0,  # opens the channel of the payload; what travels there is written by our sampler
            detokenize=False,
            extra_args={REQUEST_KEY: ours},
        )

    def step(self) -> list[Trajectory]:
        """One engine step; returns the requests that it finished, without texts (see `decode`)."""
        outputs = self._core.get_output()
        self.num_steps += 1
        finished = []
        for output in outputs.outputs:
            recording = self._recordings.get(output.request_id)
            if recording is None:  # aborted while its last step was in flight
                continue
            recording.append(output.new_token_ids, output.new_logprobs)
            self.num_tokens += len(output.new_token_ids)
            if output.prefill_stats is not None:
                self.num_prompt_tokens += output.prefill_stats.num_prompt_tokens
                self.num_cached_prompt_tokens += output.prefill_stats.num_cached_tokens
            if output.finish_reason is not None:
                self._forget(output.request_id)
                finished.append(recording.finish(str(output.finish_reason)))
        return finished

    def abort(self, request_ids: Sequence[str]) -> list[Trajectory]:
        """Stop requests; returns what they have so far, which `add(prefix=...)` can continue anywhere."""
        internal = [self._internal[name] for name in request_ids if name in self._internal]
        partial = [self._recordings[name] for name in internal]
        self._core.abort_requests(internal)
        for name in internal:
            self._forget(name)
        return [recording.finish("abort") for recording in partial]

    def _forget(self, internal: str) -> None:
        recording = self._recordings.pop(internal)
        del self._internal[recording.request.request_id]

    @property
    def num_unfinished(self) -> int:
        """Requests queued or running."""
        return len(self._recordings)

    # --- weights and state ----------------------------------------------------------------------------------------

    def load_weights(self, manifest: WeightManifest, shards: Sequence[np.ndarray]) -> None:
        """Serve another policy version from the next step on; requests and their KV survive.

        Bytes must have been verified (`rollout.weights.verify_shards`): a torn version is refused before the first
        tensor is touched only by that check.
        """
        (version, *_) = self._core.collective_rpc("load_policy", args=(manifest, list(shards)))
        self._scheduler.swap_version(version)
        self.version = version

    def stats(self) -> dict[str, float]:
        """Counters for the pool's watchdog and for metrics."""
        counters = self._core.collective_rpc("soft_counters")[0]
        return {
            "steps": self.num_steps,
            "tokens": self.num_tokens,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_prompt_tokens": self.num_cached_prompt_tokens,
            "unfinished": self.num_unfinished,
            "version": self.version,
            **{f"engine/{name}": value for name, value in counters.items()},
        }

    def decode(self, trajectory: Trajectory) -> tuple[str, str]:
        """`response_text` and `answer_text` of a finished trajectory."""
        ids = trajectory.response_ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        closed = np.flatnonzero((trajectory.kinds == Kind.ENDED) | (trajectory.kinds == Kind.FORCED))
        if not (trajectory.kinds == Kind.SOFT).any() and not len(closed):
            # A discrete response marks the end of its thinking only by the token.
            closed = np.flatnonzero(ids == self.spec.end_of_thinking_id)
        answer = self.tokenizer.decode(ids[closed[0] + 1 :], skip_special_tokens=True) if len(closed) else ""
        return text, answer

    def shutdown(self) -> None:
        """Free the model and the KV cache."""
        self._core.shutdown()


def _set_environment(spec: EngineSpec) -> None:
    """For engines outside a prepared actor (tests, tools): variables that are read late can still be set."""
    for name, value in engine_environment(spec).items():
        found = os.environ.setdefault(name, value)
        if found != value and name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER"):
            raise EngineError(f"{name}={found} in the environment: this engine needs {value}; unset it")


def stop_token_ids(model_path: str, model_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: of generation_config.json, of the model's configuration and of the tokenizer."""
    found: list[Any] = [model_config.eos_token_id, tokenizer.eos_token_id]
    generation = Path(model_path) / "generation_config.json"
    if generation.is_file():
        found.append(json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id"))
    flat = [i for value in found for i in (value if isinstance(value, list | tuple) else [value]) if i is not None]
    if not flat:
        raise EngineError(f"{model_path}: no end-of-sequence token in the model, its generation config or tokenizer")
    return tuple(sorted({int(i) for i in flat}))
