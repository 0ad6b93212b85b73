"""The rollout engine: an in-process vLLM engine that thinks in soft tokens, stepped by one thread.

    add(request) --> vLLM scheduler --> step() --> rows of payload per request (numpy) --> finished Trajectory
    load_weights(manifest, shards)  between two steps; running requests go on, their new positions carry its version

Importing this module imports neither torch nor vLLM: the driver takes `EngineSpec` and `engine_environment` from here.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout.engine_spec import (
    EngineError,
    EngineSpec,
    RequestError,
    engine_environment,
    resolve_settings,
)
from rollout.nccl_transfer import BACKEND
from rollout.payload import Recording, candidate_entropy
from rollout.request import RequestSettings, RolloutRequest
from rollout.trajectory import Kind, Trajectory

if TYPE_CHECKING:
    from rollout.nccl_transfer import Broadcast
    from rollout.weights import Shard, WeightManifest

__all__ = ["EngineError", "EngineSpec", "RequestError", "RequestSettings", "SoftEngine", "engine_environment"]


CPU_KV_CACHE_BYTES = 512 * 2**20
"""Where the size is left open: profiling a CPU would claim most of the machine's memory for one actor."""


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
        self.asleep = False
        self._check_soft_path()

    def _check_vocabulary(self) -> None:
        vocabulary = self.model_config.get_text_config().vocab_size
        if len(self.tokenizer) > vocabulary:
            raise EngineError(
                f"{self.spec.model_path}: the tokenizer has {len(self.tokenizer)} tokens but the model only "
                f"{vocabulary} embeddings; use the tokenizer that was saved with the model"
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
        optional: dict[str, Any] = {"enable_sleep_mode": True} if spec.sleeps and not on_cpu else {}
        if spec.block_size is not None:
            optional["block_size"] = spec.block_size
        if spec.transport == "nccl":
            optional["weight_transfer_config"] = {"backend": BACKEND}
        settings = {
            "max_candidates": params.max_candidates,
            "max_thinking": spec.thinking_budget,
            "end_of_thinking_id": -1 if spec.end_of_thinking_id is None else spec.end_of_thinking_id,
            "noise": params.noise,
            "noise_clip": params.noise_clip,
            "censor_delta": params.censor_delta,
            "log_epsilon": params.log_epsilon,
            "forbidden_while_thinking": self.stop_ids if spec.eos_while_thinking == "forbid" else (),
            "entropy_stop": spec.entropy_stop,
            "entropy_stop_steps": spec.entropy_stop_steps,
            "initial_version": spec.initial_version,
        }
        return {
            "model": spec.model_path,
            "dtype": spec.dtype,
            "trust_remote_code": spec.trust_remote_code,
            "seed": spec.seed,
            "tensor_parallel_size": spec.tensor_parallel_size,
            # Inside a Ray actor vLLM would place its ranks through Ray, which knows nothing of our actor's resources.
            "distributed_executor_backend": "mp" if spec.tensor_parallel_size > 1 else "uni",
            "max_num_seqs": spec.max_num_seqs,
            "max_model_len": spec.max_model_len,
            "max_num_batched_tokens": max(spec.max_num_batched_tokens, spec.max_num_seqs),
            "kv_cache_memory_bytes": spec.kv_cache_memory_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None),
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
        if self.asleep:
            raise RequestError(f"request {request.request_id} came to an engine that is asleep")
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
        num_soft, num_candidates = prefix.candidate_ids.shape
        if num_soft and num_candidates != self.params.max_candidates:
            raise RequestError(
                f"request {request.request_id}: the prefix has {num_candidates} candidates per soft position, this "
                f"engine max_candidates={self.params.max_candidates}"
            )
        if num_soft > values["thinking_budget"]:
            raise RequestError(
                f"request {request.request_id}: the prefix has {num_soft} soft positions, more than "
                f"thinking_budget={values['thinking_budget']}"
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
                    "history_entropy": candidate_entropy(prefix.candidate_logprobs),
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
        """Stop requests; what they have so far (finish reason `cut`), which `add(prefix=...)` continues anywhere."""
        internal = [self._internal[name] for name in request_ids if name in self._internal]
        partial = [self._recordings[name] for name in internal]
        self._core.abort_requests(internal)
        for name in internal:
            self._forget(name)
        return [recording.finish("cut") for recording in partial]

    def _forget(self, internal: str) -> None:
        recording = self._recordings.pop(internal)
        del self._internal[recording.request.request_id]

    @property
    def num_unfinished(self) -> int:
        """Requests queued or running."""
        return len(self._recordings)

    # --- sleep ---------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give the device's memory up: weights go to the host, KV is forgotten. The next version wakes the engine.

        Not vLLM's deeper level, which also discards what our sampler keeps beside the weights. Where vLLM has nothing
        to free (on a CPU) the engine refuses requests all the same.
        """
        if self.num_unfinished:
            raise EngineError(f"an engine with {self.num_unfinished} requests cannot sleep")
        if not self.asleep:
            self._core.sleep(level=1)
            self.asleep = True

    def wake(self) -> None:
        """Take the memory back, with the weights of before; harmless when awake."""
        if self.asleep:
            self._core.wake_up()
            self.asleep = False

    # --- weights and state ----------------------------------------------------------------------------------------

    def load_weights(self, manifest: WeightManifest, shards: Sequence[Shard]) -> None:
        """Serve another policy version from the next step on; requests and their KV survive.

        Bytes must have been verified (`rollout.weights.verify_shards`): a torn version is refused before the first
        tensor is touched only by that check.
        """
        self.wake()
        self._swapped(self._core.collective_rpc("load_policy", args=(manifest, list(shards))))

    def receive_weights(self, broadcast: Broadcast) -> None:
        """The same with a version that the learner broadcasts now. After an exception this engine must not step."""
        self._swapped(self._core.collective_rpc("receive_policy", args=(broadcast,)))

    def _swapped(self, versions: Sequence[int]) -> None:
        self.version = versions[0]
        self._scheduler.swap_version(self.version)

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
