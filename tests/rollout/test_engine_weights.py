"""Weight updates of a running engine: every layer, tied heads included, nothing lost, versions per position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout.engine import RequestSettings, SoftEngine
from rollout.request import RolloutRequest
from rollout.trajectory import Kind, Trajectory
from rollout.transport import FullSender, Part
from rollout.weights import WeightManifest
from tests.conftest import build_tiny_model
from tests.rollout.conftest import EngineFactory, reference_model
from tests.rollout.naive_loop import replayed_logprobs
from tests.rollout.stored import stored

pytestmark = pytest.mark.slow


def build_qwen2(directory: Path, *, tied: bool, kv_heads: int = 1) -> Path:
    """A tiny Qwen2 (biases in the attention projections) with the tokenizer of the tiny Llama."""
    from tests.tiny_models import tiny_qwen2

    return build_from(tiny_qwen2(num_key_value_heads=kv_heads, tie_word_embeddings=tied), directory)


def build_from(config: Any, directory: Path) -> Path:
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import spread_weights

    build_tiny_model(directory)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    spread_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms, so that none of them is neutral
                parameter.add_(0.06 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def changed(model: Any, seed: int) -> Any:
    """Move every parameter, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def bundle(model: Any, version: int) -> tuple[WeightManifest, list[Part]]:
    """What the learner publishes: a tied head is not sent twice."""
    tied = model.config.tie_word_embeddings
    named = ((name, value) for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight"))
    parts, link = stored(FullSender(), version, named)
    return link.manifest, parts


def request(index: int, prompt_len: int = 40, thinking: str = "soft") -> RolloutRequest:
    prompt = tuple(5 + (7 * index + 3 * position) % 59 for position in range(prompt_len))
    return RolloutRequest(f"w{index}/0", f"w{index}", f"w{index}", 0, 77 + index, prompt, thinking)  # type: ignore[arg-type]


def generate(engine: SoftEngine, requests: list[RolloutRequest], **settings: Any) -> list[Trajectory]:
    for each in requests:
        engine.add(each, settings=RequestSettings(**settings))
    finished: list[Trajectory] = []
    while engine.num_unfinished:
        finished += engine.step()
    return sorted(finished, key=lambda trajectory: trajectory.request_id)


def check_scored_by(model: Any, trajectory: Trajectory) -> int:
    """The recorded log-densities of discrete positions are those of `model` (temperature 1 throughout); how many."""
    expected = replayed_logprobs(model, trajectory, np.ones(len(trajectory.response_ids)))
    scored = (trajectory.kinds == Kind.DISCRETE) | (trajectory.kinds == Kind.ENDED)
    np.testing.assert_allclose(trajectory.log_density[scored], expected[scored], atol=2e-5)
    return int(scored.sum())


@pytest.mark.parametrize(
    ("layout", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False), ("qwen3", False)]
)
def test_update_and_back_matches_transformers(
    layout: str, tied: bool, start_engine: EngineFactory, tmp_path: Path
) -> None:
    from tests.tiny_models import tiny_qwen3

    if layout == "qwen3":
        directory = build_from(tiny_qwen3(tie_word_embeddings=tied), tmp_path)
    else:
        directory = build_qwen2(tmp_path, tied=tied) if layout == "qwen2" else build_tiny_model(tmp_path, tied=tied)
    model, original = reference_model(directory), reference_model(directory)
    changed(model, seed=3)
    requests = [request(0), request(1), *(request(index, thinking="discrete") for index in range(2, 6))]
    settings = {"max_new_tokens": 24, "thinking_budget": 8}
    with start_engine(directory) as engine:
        first = generate(engine, requests, **settings)
        engine.load_weights(*bundle(model, 1))
        second = generate(engine, requests, **settings)
        engine.load_weights(*bundle(original, 2))
        third = generate(engine, requests, **settings)
    for version, reference, trajectories in ((0, original, first), (1, model, second), (2, original, third)):
        assert sum(check_scored_by(reference, trajectory) for trajectory in trajectories) >= 8
        assert all((trajectory.versions == version).all() for trajectory in trajectories)
    for before, after in zip(first, third, strict=True):
        assert before.response_ids.tolist() == after.response_ids.tolist()
        np.testing.assert_array_equal(before.weights, after.weights)
