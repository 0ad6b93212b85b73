"""The engine on a CUDA device: graphs, asynchronous scheduling, bf16, two ranks. Needs the CUDA build of vLLM."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout.engine import RequestSettings, SoftEngine
from rollout.request import RolloutRequest
from rollout.trajectory import Kind, Trajectory
from tests.rollout.conftest import base_spec, mixed_cases, reference_model, run
from tests.rollout.test_engine_weights import build_qwen2, bundle, changed
from tests.rollout.test_soft_parity import assert_parity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def gpu_spec(model: Path, **changes: Any) -> Any:
    defaults = {"device": "cuda", "kv_cache_memory_bytes": 256 << 20, "block_size": 16, "gpu_memory_utilization": 0.5}
    return dataclasses.replace(base_spec(model), **{**defaults, **changes})


def generate(engine: SoftEngine, count: int, **settings: Any) -> list[Trajectory]:
    for index in range(count):
        prompt = tuple(5 + (7 * index + 3 * position) % 59 for position in range(20 + index))
        request = RolloutRequest(f"r{index}", "g", "p", index, index, prompt)
        engine.add(request, settings=RequestSettings(**settings))
    finished: list[Trajectory] = []
    while engine.num_unfinished:
        finished += engine.step()
    return sorted(finished, key=lambda trajectory: trajectory.request_id)


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
def test_greedy_answers_match_the_naive_loop(enforce_eager: bool, tmp_path: Path) -> None:
    """Answers are greedy: on a GPU the stock sampler draws with its own noise, which the naive loop does not have."""
    directory = build_qwen2(tmp_path, tied=True)
    model = reference_model(directory)
    cases = [
        dataclasses.replace(case, settings=dataclasses.replace(case.settings, answer_temperature=0.0))
        for case in mixed_cases(model, base_spec(directory), count=32, seed=3)
    ]
    from tests.rollout.conftest import reference_case

    cases = [reference_case(model, base_spec(directory), case.request, case.settings) for case in cases]
    engine = SoftEngine(gpu_spec(directory, enforce_eager=enforce_eager))
    assert_parity(cases, run(engine, cases), max_ties=3)
    changed(model, seed=4)
    engine.load_weights(*bundle(model, 1))
    after = [reference_case(model, base_spec(directory), case.request, case.settings) for case in cases[:8]]
    assert_parity(after, run(engine, after), max_ties=2)
    engine.shutdown()


def test_bf16_weights_are_exact_in_fp32(tmp_path: Path) -> None:
    """The payload stays fp32 whatever the model computes in: weights add up, and equal softmax of what is stored."""
    engine = SoftEngine(gpu_spec(build_qwen2(tmp_path, tied=True), dtype="bfloat16"))
    for trajectory in generate(engine, 16, max_new_tokens=40, thinking_budget=20):
        soft = trajectory.kinds == Kind.SOFT
        assert soft.any()
        np.testing.assert_allclose(trajectory.weights.sum(axis=1), 1.0, atol=1e-6)
        perturbed = trajectory.candidate_logprobs.astype(np.float64) + trajectory.noise
        visible = perturbed >= trajectory.censor_threshold[:, None]
        expected = np.where(visible, np.exp((perturbed - perturbed.max(axis=1, keepdims=True)) / 0.1), 0.0)
        np.testing.assert_allclose(trajectory.weights, expected / expected.sum(axis=1, keepdims=True), atol=2e-4)
    engine.shutdown()


def test_a_sleeping_engine_gives_its_memory_to_others(tmp_path: Path) -> None:
    """As a learner on the same GPU needs it: half of the device freed, the same answers after, then new weights."""
    directory = build_qwen2(tmp_path, tied=True)
    engine = SoftEngine(gpu_spec(directory, sleeps=True, kv_cache_memory_bytes=None))
    before = generate(engine, 4, max_new_tokens=40, thinking_budget=20)
    awake_bytes, total_bytes = torch.cuda.mem_get_info()
    engine.sleep()
    asleep_bytes, _ = torch.cuda.mem_get_info()
    assert asleep_bytes - awake_bytes > 0.3 * total_bytes
    taken = torch.empty(int(0.4 * total_bytes), dtype=torch.uint8, device="cuda")
    del taken
    torch.cuda.empty_cache()
    engine.wake()
    after = generate(engine, 4, max_new_tokens=40, thinking_budget=20)
    assert [t.response_ids.tolist() for t in after] == [t.response_ids.tolist() for t in before]
    engine.sleep()
    model = reference_model(directory)
    changed(model, seed=4)
    engine.load_weights(*bundle(model, 1))
    assert {int(t.versions.min()) for t in generate(engine, 4, max_new_tokens=10)} == {1}
    engine.shutdown()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks(tmp_path: Path) -> None:
    directory = build_qwen2(tmp_path, tied=True, kv_heads=2)
    one = SoftEngine(gpu_spec(directory))
    alone = generate(one, 12, max_new_tokens=40, thinking_budget=20)
    one.shutdown()
    two = SoftEngine(gpu_spec(directory, tensor_parallel_size=2))
    together = generate(two, 12, max_new_tokens=40, thinking_budget=20)
    two.shutdown()
    equal = sum(a.response_ids.tolist() == b.response_ids.tolist() for a, b in zip(alone, together, strict=True))
    assert equal >= 11, "near-ties may part one response, not more"
