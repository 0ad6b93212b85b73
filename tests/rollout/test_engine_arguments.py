"""From an `EngineSpec` to what vLLM and the sampler are told, without starting either."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout.engine import CPU_KV_CACHE_BYTES, EngineSpec, SoftEngine
from rollout.nccl_transfer import BACKEND
from rollout.soft_token import SoftTokenParams
from rollout.vllm_soft import CONFIG_KEY

GPU = {"device": "cuda", "kv_cache_memory_bytes": None}
SOFT = {"max_candidates": 8, "noise": "gaussian", "noise_clip": (-0.5, 0.5), "log_epsilon": 1e-3}
OURS = "additional_config." + CONFIG_KEY


def arguments(**changes: Any) -> dict[str, Any]:
    """What `EngineArgs` gets."""
    engine = object.__new__(SoftEngine)
    engine.spec = EngineSpec(**{"model_path": "m", "kv_cache_memory_bytes": 7, **changes})
    engine.params = SoftTokenParams(**engine.spec.soft)
    engine.stop_ids = (2, 3)
    return engine._engine_arguments("LlamaForCausalLM")


def what_changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Our own settings apart, with the key that they travel under in front."""
    found: dict[str, Any] = {}
    for old, new, prefix in (
        (before, after, ""),
        (before["additional_config"][CONFIG_KEY], after["additional_config"][CONFIG_KEY], f"{OURS}."),
    ):
        names = (old | new).keys() - {"additional_config"}
        found |= {prefix + name: new.get(name) for name in names if old.get(name) != new.get(name)}
    return found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_path": "other"}, {"model": "other"}),
        ({"dtype": "float32"}, {"dtype": "float32"}),
        ({"trust_remote_code": True}, {"trust_remote_code": True}),
        ({"seed": 7}, {"seed": 7}),
        ({"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}),
        ({"max_num_seqs": 9}, {"max_num_seqs": 9}),
        ({"max_num_seqs": 4096}, {"max_num_seqs": 4096, "max_num_batched_tokens": 4096}),
        ({"max_model_len": 99}, {"max_model_len": 99}),
        ({"max_num_batched_tokens": 999}, {"max_num_batched_tokens": 999}),
        ({"kv_cache_memory_bytes": 8}, {"kv_cache_memory_bytes": 8}),
        ({"kv_cache_memory_bytes": None}, {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}),
        ({"gpu_memory_utilization": 0.3}, {"gpu_memory_utilization": 0.3}),
        ({"enable_prefix_caching": False}, {"enable_prefix_caching": False}),
        ({"block_size": 32}, {"block_size": 32}),
        ({"transport": "nccl"}, {"weight_transfer_config": {"backend": BACKEND}}),
        ({"enforce_eager": True}, {}),
        ({"sleeps": True}, {}),
        ({"thinking_budget": 5}, {f"{OURS}.max_thinking": 5}),
        ({"end_of_thinking_id": 4}, {f"{OURS}.end_of_thinking_id": 4}),
        ({"eos_while_thinking": "forbid"}, {f"{OURS}.forbidden_while_thinking": (2, 3)}),
        ({"entropy_stop": 0.5}, {f"{OURS}.entropy_stop": 0.5}),
        ({"entropy_stop_steps": 3}, {f"{OURS}.entropy_stop_steps": 3}),
        ({"initial_version": 3}, {f"{OURS}.initial_version": 3}),
        ({"soft": {"censor_delta": 0.1}}, {f"{OURS}.censor_delta": 0.1}),
        ({"soft": SOFT}, {f"{OURS}.{name}": value for name, value in SOFT.items()}),
    ],
    ids=str,
)
def test_a_field_arrives_where_it_is_used_and_nowhere_else(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert what_changed(arguments(), arguments(**changes)) == expected


def test_a_gpu_is_profiled_compiled_and_given_up_as_the_spec_says() -> None:
    found = arguments(**GPU, sleeps=True)
    assert (found["kv_cache_memory_bytes"], found["enforce_eager"], found["enable_sleep_mode"]) == (None, False, True)
    assert found["scheduler_cls"].endswith("SoftAsyncScheduler")
    assert what_changed(found, arguments(**GPU, sleeps=True, enforce_eager=True)) == {"enforce_eager": True}


@pytest.mark.slow
def test_the_sampler_draws_with_the_settings_of_the_engine_and_of_each_request() -> None:
    from rollout.vllm_sampler import SoftSampler
    from rollout.vllm_state import EngineSettings

    config = SimpleNamespace(additional_config=arguments(soft={**SOFT, "censor_delta": None})["additional_config"])
    floats = torch.tensor([[0.7, 0.8, 0.1, 0.2, 0.5], [1.0, 0.9, 0.0, 0.1, 1.0]])
    table = {"floats": floats, "top_k": torch.tensor([3, 5]), "seed": torch.tensor([7, 8])}
    sampler = object.__new__(SoftSampler)
    sampler._state = SimpleNamespace(
        settings=EngineSettings.of(config),
        table=SimpleNamespace(**{name: SimpleNamespace(gpu=values) for name, values in table.items()}),
    )
    sampler._forbidden = None
    drawn: list[Any] = []
    sampler._fused = lambda *arguments: drawn.append(arguments)
    sampler._draw(torch.zeros(2, 9), torch.tensor([1, 0]), torch.tensor([4, 5]))
    ((_, params, noise),) = drawn
    assert {name: getattr(params, name) for name in SOFT} == SOFT
    assert params.censor_delta is None
    names = ("temperature", "top_p", "min_p", "gumbel_temperature", "noise_scale")
    assert torch.equal(torch.stack([getattr(params, name) for name in names], 1), floats.flip(0))
    assert (params.top_k.tolist(), noise.seed.tolist(), noise.position.tolist()) == ([5, 3], [8, 7], [4, 5])
