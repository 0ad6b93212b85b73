"""Hand-made trajectories for learner tests: valid to the last column, with a response chosen by the test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from learner.spec import LearnerSpec, ScoredGroup
from rollout.trajectory import Kind, Trajectory, pack

if TYPE_CHECKING:
    from learner.model import PolicyModel

END_OF_THINKING, EOS = 4, 2
TAU, CENSOR_DELTA = 0.1, 1e-3
LAYERS = 2
"""Of the tiny model."""


def learner_spec(model: Path, **changes: object) -> LearnerSpec:
    """A small fp32 learner on the CPU."""
    spec = LearnerSpec(
        model_path=str(model),
        total_steps=20,
        learning_rate=1e-3,
        weight_decay=0.0,
        zero3_persistent_elements=0,
        micro_batch_tokens=64,
        max_new_tokens=32,
        kl_coefficient=0.0,
        censor_delta=CENSOR_DELTA,
        gumbel_temperature=TAU,
        collective_timeout_s=30.0,
        startup_timeout_s=180.0,
        step_timeout_s=120.0,
        sync_timeout_s=60.0,
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


def without_machine(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of a training step but times and memory, which no two runs share."""
    return {name: value for name, value in metrics.items() if not name.endswith(("_s", "_s_max", "_s_mean", "_mb_max"))}


def count_layer_runs(policy: PolicyModel) -> list[None]:
    """Grows with every run of a layer of the tiny model."""
    runs: list[None] = []
    layers = [module for module in policy.modules() if type(module).__name__ == "LlamaDecoderLayer"]
    assert len(layers) == LAYERS
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(None))
    return runs


def make_trajectory(
    rng: np.random.Generator,
    name: str,
    answer: Sequence[int],
    *,
    thinking: int = 4,
    vocabulary: int = 64,
    candidates: int = 5,
    version: int = 0,
) -> Trajectory:
    """`thinking` soft positions (some with filtered candidates), the end of thinking, then `answer` and EOS."""
    ids = np.stack([rng.permutation(np.arange(6, vocabulary))[:candidates] for _ in range(thinking)]).astype(np.int32)
    logits = rng.normal(0, 1, (thinking, candidates))
    logits[::2, -2:] = -np.inf
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    noise = np.where(np.isfinite(logprobs), rng.gumbel(size=logprobs.shape), 0.0)
    order = np.argsort(-(logprobs + noise), axis=-1, kind="stable")
    ids, logprobs, noise = (np.take_along_axis(x, order, -1) for x in (ids, logprobs, noise))
    logprobs, noise = logprobs.astype(np.float32), noise.astype(np.float32)
    perturbed = logprobs + noise
    threshold = (perturbed[:, 0] + TAU * np.log(CENSOR_DELTA)).astype(np.float32)
    shown = np.where(perturbed >= threshold[:, None], perturbed, -np.inf)
    weights = np.exp((shown - shown[:, :1]) / TAU)
    response = [*ids[:, 0].tolist(), END_OF_THINKING, *answer, EOS]
    kinds = [Kind.SOFT] * thinking + [Kind.ENDED] + [Kind.DISCRETE] * (len(answer) + 1)
    group, _, sample = name.rpartition("/")
    return Trajectory(
        request_id=name,
        group_id=group,
        prompt_id=group,
        sample_index=int(sample),
        seed=1,
        prompt_ids=np.array([1, *rng.integers(6, vocabulary, rng.integers(2, 5)), 3], np.int32),
        response_ids=np.array(response, np.int32),
        kinds=np.array(kinds, np.uint8),
        versions=np.full(len(response), version, np.int64),
        log_density=np.full(len(response), -1.0, np.float32),
        candidate_ids=ids,
        candidate_logprobs=logprobs,
        noise=noise,
        weights=(weights / weights.sum(-1, keepdims=True)).astype(np.float32),
        censor_threshold=threshold,
        finish_reason="stop",
        response_text="",
        answer_text="",
    )


def make_group(seed: int, size: int = 4, **options: object) -> ScoredGroup:
    """A group whose answers are [10, 11] with reward 1 and [20, 21] with reward 0, alternating; lengths vary."""
    rng = np.random.default_rng(seed)
    name = f"prompt{seed}@0"
    options.setdefault("candidates", 5)
    rows = [
        make_trajectory(
            rng, f"{name}/{i}", [10, 11] if i % 2 == 0 else [20, 21], thinking=int(rng.integers(2, 7)), **options
        )
        for i in range(size)
    ]
    rewards = tuple(float(i % 2 == 0) for i in range(size))
    return ScoredGroup(name, pack(rows, int(options["candidates"])), rewards, (True,) * size)  # type: ignore[call-overload]
