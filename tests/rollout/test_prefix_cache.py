"""A KV block is only served to a request that would compute the same contents: not soft KV, not another version's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout.engine import RequestSettings, SoftEngine
from rollout.request import RolloutRequest
from rollout.trajectory import Kind, Trajectory
from rollout.vllm_scheduler import SoftScheduler
from tests.rollout.conftest import EngineFactory, reference_model
from tests.rollout.naive_loop import replayed_logprobs
from tests.rollout.test_engine_weights import bundle, changed

pytestmark = pytest.mark.slow

BLOCK = 32
PROMPT = tuple(5 + (11 * position) % 59 for position in range(2 * BLOCK + 6))


def request(name: str, prompt: tuple[int, ...], thinking: str = "discrete", seed: int = 1) -> RolloutRequest:
    return RolloutRequest(f"{name}/0", name, name, 0, seed, prompt, thinking)  # type: ignore[arg-type]


def finish(engine: SoftEngine) -> dict[str, Trajectory]:
    finished: dict[str, Trajectory] = {}
    while engine.num_unfinished:
        finished |= {trajectory.request_id: trajectory for trajectory in engine.step()}
    return finished


def generate_one(engine: SoftEngine, each: RolloutRequest, **settings: Any) -> tuple[Trajectory, int]:
    """The trajectory and how many of its prompt tokens came from the cache."""
    before = engine.num_cached_prompt_tokens
    engine.add(each, settings=RequestSettings(**settings))
    return finish(engine)[each.request_id], engine.num_cached_prompt_tokens - before


def first_token_error(model: Any, trajectory: Trajectory) -> float:
    expected = replayed_logprobs(model, trajectory, np.ones(len(trajectory.response_ids)))
    return float(abs(trajectory.log_density[0] - expected[0]))


def think_then_follow_up(engine: SoftEngine, model: Any) -> tuple[int, float]:
    """A soft response, then an ordinary prompt that continues its text: cached tokens and error of the first one."""
    soft, _ = generate_one(
        engine,
        request("thinker", PROMPT, "soft"),
        thinking_budget=60,
        max_new_tokens=60,
        gumbel_temperature=1.0,
        top_p=1.0,
        top_k=8,
    )
    assert (soft.kinds == Kind.SOFT).sum() >= BLOCK, "the text must fill a block with soft positions"
    follow_up = request("reader", PROMPT + tuple(int(token) for token in soft.response_ids), seed=2)
    answer, cached = generate_one(engine, follow_up, max_new_tokens=4)
    return cached, first_token_error(model, answer)


def test_soft_blocks_are_not_served_as_token_blocks(
    start_engine: EngineFactory, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative half runs vLLM's own scheduler: if it were safe, ours would be unnecessary."""
    model = reference_model(tiny_model_dir)
    with start_engine(tiny_model_dir) as engine:
        cached, error = think_then_follow_up(engine, model)
    assert cached == 2 * BLOCK, "the prompt itself stays shared"
    assert error < 2e-5

    arguments = SoftEngine._engine_arguments

    def stock_scheduler(self: SoftEngine, architecture: str) -> dict[str, Any]:
        return {k: v for k, v in arguments(self, architecture).items() if k != "scheduler_cls"}

    monkeypatch.setattr(SoftEngine, "_engine_arguments", stock_scheduler)
    with start_engine(tiny_model_dir) as engine:
        cached, error = think_then_follow_up(engine, model)
    assert cached > 2 * BLOCK
    assert error > 1e-4


def test_prompts_are_shared_inside_a_group(engine: SoftEngine) -> None:
    prompt = tuple(reversed(PROMPT))
    _, cached = generate_one(engine, request("first", prompt, "soft"), max_new_tokens=4)
    assert cached == 0
    for index, thinking in enumerate(("soft", "discrete")):
        _, cached = generate_one(engine, request(f"next{index}", prompt, thinking, seed=9 + index), max_new_tokens=4)
        assert cached == 2 * BLOCK


@pytest.mark.parametrize("rekeyed", [True, False], ids=["rekeyed", "negative-not-rekeyed"])
def test_requests_queued_across_a_swap_miss_the_old_blocks(
    rekeyed: bool, start_engine: EngineFactory, parity_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, model = reference_model(parity_model_dir), changed(reference_model(parity_model_dir), seed=5)
    if not rekeyed:
        monkeypatch.setattr(SoftScheduler, "swap_version", lambda self, version: None)
    with start_engine(max_num_seqs=1) as engine:
        for index in range(3):
            engine.add(request(f"q{index}", PROMPT, seed=3 + index), settings=RequestSettings(max_new_tokens=12))
        finished: dict[str, Trajectory] = {}
        for _ in range(6):
            finished |= {trajectory.request_id: trajectory for trajectory in engine.step()}
        assert not finished, "the first request must be running when the weights change"
        engine.load_weights(*bundle(model, 1))
        finished |= finish(engine)
        cached = engine.num_cached_prompt_tokens
    running, *queued = (finished[f"q{index}/0"] for index in range(3))
    assert set(running.versions) == {0, 1}
    before = running.versions == 0
    expected = replayed_logprobs(original, running, np.ones(len(running.response_ids)))
    np.testing.assert_allclose(running.log_density[before], expected[before], atol=2e-5)
    errors = [first_token_error(model, trajectory) for trajectory in queued]
    assert all(set(trajectory.versions) == {1} for trajectory in queued)
    if rekeyed:
        assert max(errors) < 2e-5
        assert cached == 2 * BLOCK, "the second queued request shares the prompt that the first one computed"
    else:
        assert max(errors) > 1e-3
