"""Soft tokens inside stock vLLM, model runner V2: registration, model classes and the checks that run before a start.

Nothing of vLLM is patched. The seams, in the order in which they act:

    register()            entry point `vllm.general_plugins`, also called by the engine and by every worker
    Soft*ForCausalLM      a stock class plus `get_model_state_cls()`                         (this module)
    SoftWorker            tells preempted from finished requests, loads policies             (vllm_worker)
    SoftScheduler         prefix-cache hashes salted by weight version and request           (vllm_scheduler)
    SoftModelState        per-slot history; supplies `inputs_embeds`; wraps the sampler      (vllm_state, vllm_sampler)

All contact with vLLM internals is in these four modules, in cpu_kernels (machines without Triton) and in engine.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

TESTED_VLLM = ("0.32.",)
"""Prefixes of the vLLM versions that the seams were tested with."""

ARCHITECTURES = {
    "LlamaForCausalLM": "vllm.model_executor.models.llama",
    "Qwen2ForCausalLM": "vllm.model_executor.models.qwen2",
    "Qwen3ForCausalLM": "vllm.model_executor.models.qwen3",
}
"""Supported architectures and the modules of their stock classes; a decoder whose `model.embed_tokens` is a plain
lookup needs one line here."""

REQUEST_KEY = "softgrpo"
"""Key of our settings in `SamplingParams.extra_args`."""

CONFIG_KEY = "softgrpo"
"""Key of the engine-wide settings in vLLM's `additional_config`."""


class SeamError(RuntimeError):
    """This vLLM does not offer what soft tokens need; the message names what is missing."""


def soft_architecture(architecture: str) -> str:
    """The registered name of the soft twin of a stock architecture."""
    return f"Soft{architecture}"


def register() -> None:
    """Register the soft model classes in this process. vLLM calls it in every process through the entry point; the
    engine and the workers call it too, so that code carried as a `working_dir` needs no installed package."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES:
        name = soft_architecture(architecture)
        if name not in known:
            ModelRegistry.register_model(name, f"rollout.vllm_soft:{name}")


def register_classes() -> None:
    """Like `register`, with the classes themselves: vLLM then does not start a process to inspect them."""
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        name = soft_architecture(architecture)
        ModelRegistry.register_model(name, _soft_class(architecture))


def __getattr__(name: str) -> Any:
    """Make the soft model classes on first use: importing this module must not import vLLM."""
    architecture = name.removeprefix("Soft")
    if name.startswith("Soft") and architecture in ARCHITECTURES:
        return _soft_class(architecture)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _soft_class(architecture: str) -> type:
    name = soft_architecture(architecture)
    if name in globals():
        return globals()[name]
    stock = getattr(importlib.import_module(ARCHITECTURES[architecture]), architecture)

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        # Without this check the V1 runner, which knows no model states, would silently produce discrete rollouts.
        if not vllm_config.use_v2_model_runner:
            raise SeamError(
                "soft tokens need vLLM's model runner V2, but this configuration selects V1, which would silently "
                "roll out discrete tokens. Set VLLM_USE_V2_MODEL_RUNNER=1 (engine_environment() does)."
            )
        stock.__init__(self, vllm_config=vllm_config, prefix=prefix)

    def get_model_state_cls() -> type:
        from rollout.vllm_state import SoftModelState

        return SoftModelState

    members = {
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"{architecture} whose thinking phase is fed with mixtures of embeddings.",
        "get_model_state_cls": staticmethod(get_model_state_cls),
    }
    globals()[name] = type(name, (stock,), members)
    return globals()[name]


def probe_seams() -> None:
    """Check that the installed vLLM has every seam we rely on; raises `SeamError` naming all that do not fit."""
    import vllm

    problems = []
    if not vllm.__version__.startswith(TESTED_VLLM):
        problems.append(f"vLLM {vllm.__version__} is not among the tested versions {', '.join(TESTED_VLLM)}x")
    problems += _missing_members()
    problems += _changed_signatures()
    if problems:
        raise SeamError("this vLLM does not fit the soft-token engine:\n  " + "\n  ".join(problems))


_MEMBERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        (
            "idx_mapping",
            "idx_mapping_np",
            "query_start_loc",
            "query_start_loc_np",
            "positions",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "is_prefilling_np",
            "num_computed_tokens_np",
            "num_scheduled_tokens",
            "num_tokens_after_padding",
            "expanded_local_pos",
            "logits_indices",
        ),
    ),
    ("vllm.v1.outputs", "LogprobsTensors", ("logprob_token_ids", "logprobs", "selected_token_ranks")),
    ("vllm.v1.outputs", "LogprobsLists", ("logprob_token_ids", "logprobs", "sampled_token_ranks")),
    ("vllm.v1.core.sched.output", "SchedulerOutput", ("preempted_req_ids", "finished_req_ids")),
    ("vllm.v1.core.sched.output", "NewRequestData", ("prompt_token_ids", "prefill_token_ids", "sampling_params")),
    ("vllm.v1.engine", "EngineCoreOutput", ("request_id", "new_token_ids", "new_logprobs", "finish_reason")),
)

_SIGNATURES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState", "add_request", ("req_index", "new_req_data")),
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState", "remove_request", ("req_id",)),
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState", "apply_staged_writes", ()),
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState", "prepare_inputs", ("input_batch", "req_states")),
    (
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState",
        "prepare_dummy_inputs",
        ("num_reqs", "num_tokens"),
    ),
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState", "custom_sampler", ("sampler",)),
    ("vllm.v1.worker.gpu.sample.sampler", "Sampler", "__call__", ("logits", "input_batch")),
    ("vllm.v1.worker.gpu.sample.sampler", "Sampler", "add_request", ("req_idx", "sampling_params")),
    (
        "vllm.v1.worker.gpu.sample.sampler",
        "Sampler",
        "sample",
        (
            "logits",
            "expanded_idx_mapping",
            "idx_mapping",
            "idx_mapping_np",
            "pos",
            "input_ids",
            "expanded_local_pos",
            "seq_lens_upper_bound_np",
            "return_logprobs",
        ),
    ),
    ("vllm.v1.request", "Request", "update_block_hashes", ()),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "add_request", ("request",)),
)


def _missing_members() -> list[str]:
    problems = []
    for module, owner, names in _MEMBERS:
        try:
            known = _member_names(getattr(importlib.import_module(module), owner))
        except (ImportError, AttributeError):
            problems.append(f"{module}.{owner} does not exist")
            continue
        problems += [f"{module}.{owner} has no {name}" for name in names if name not in known]
    request = importlib.import_module("vllm.v1.request").Request
    if "_block_hasher" not in inspect.getsource(request.update_block_hashes):
        problems.append("vllm.v1.request.Request._block_hasher is gone: prefix caching would mix soft and token KV")
    return problems


def _member_names(owner: Any) -> set[str]:
    names = set(dir(owner))
    for base in getattr(owner, "__mro__", ()):
        names |= set(getattr(base, "__annotations__", {}))
    return names


def _changed_signatures() -> list[str]:
    problems = []
    for module, owner, name, expected in _SIGNATURES:
        try:
            function = getattr(getattr(importlib.import_module(module), owner), name)
        except (ImportError, AttributeError):
            problems.append(f"{module}.{owner}.{name} does not exist")
            continue
        found = tuple(inspect.signature(function).parameters)[1:]
        if found[: len(expected)] != expected:
            problems.append(f"{module}.{owner}.{name} takes {_listing(found)}, expected {_listing(expected)}")
    return problems


def _listing(names: Sequence[str]) -> str:
    return f"({', '.join(names)})"


def refuse_unsupported(vllm_config: Any) -> None:
    """Raise `SeamError` with every engine feature that cannot be combined with soft tokens."""
    parallel = vllm_config.parallel_config
    problems = []
    if parallel.pipeline_parallel_size != 1:
        problems.append("pipeline parallelism (only token ids travel between stages; use tensor parallelism)")
    if getattr(parallel, "prefill_context_parallel_size", 1) != 1:
        problems.append("prefill context parallelism")
    if getattr(parallel, "decode_context_parallel_size", 1) != 1:
        problems.append("decode context parallelism")
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        problems.append("batch-sharded sampling (every rank must know every row's mixture)")
    if vllm_config.speculative_config is not None:
        problems.append("speculative decoding (a draft is a token, not a mixture)")
    if vllm_config.lora_config is not None:
        problems.append("LoRA adapters (publish merged weights instead)")
    if problems:
        raise SeamError("soft tokens cannot be combined with: " + "; ".join(problems))


def refuse_parameters(request_id: str, params: Any) -> None:
    """Raise `ValueError` if a soft request carries settings that act on logits: the soft draw reads them raw."""
    neutral = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "n": 1,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": None,
        "structured_outputs": None,
    }
    given = [
        f"{name}={value}" for name, rest in neutral.items() if (value := getattr(params, name)) != rest and value != []
    ]
    if given:
        raise ValueError(f"request {request_id}: {', '.join(given)} cannot be applied while thinking in soft tokens")
