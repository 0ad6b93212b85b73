"""ZeRO stages, ranks, offload, checkpointed activations and adapters change where things are, not what is learned."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from learner.group import LearnerGroup
from learner.spec import LearnerError, LearnerSpec, NonFiniteGradients, ScoredGroup
from learner.trainer import MAX_REFUSED_IN_A_ROW, Trainer
from rollout.weights import iterate_weights
from tests.learner.handmade import learner_spec, make_group
from tests.learner.two_ranks import STEPS, Pair, Weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local", "single_rank")]

FP32_TOLERANCE = 2e-3
"""Distance between two updates as a share of the update, per tensor, after 3 steps. Sums over ranks and passes are
taken in another order, and Adam makes whole steps of gradients that are hardly more than rounding."""
BFLOAT16_TOLERANCE = 0.1
"""The same for bf16 passes and weights, over the whole model: norm weights near 1 lie on a coarse grid."""


@pytest.fixture(scope="module")
def groups() -> list[ScoredGroup]:
    return [make_group(seed) for seed in range(4)]


def trained_alone(spec: LearnerSpec, groups: list[ScoredGroup]) -> tuple[Weights, list[dict[str, float]]]:
    trainer = Trainer(spec, rank=0)
    metrics = [trainer.train(groups, version) for version in range(STEPS)]
    return {name: weight.clone() for name, weight in trainer.weights()}, metrics


@pytest.fixture(scope="module")
def base_spec(tiny_model_dir: Path) -> LearnerSpec:
    return learner_spec(tiny_model_dir, mini_batches=2, micro_batch_tokens=40, kl_coefficient=0.01)


@pytest.fixture(scope="module")
def start(tiny_model_dir: Path) -> Weights:
    """The untrained weights."""
    from safetensors.torch import load_file

    return load_file(tiny_model_dir / "model.safetensors")


@pytest.fixture(scope="module")
def baseline(base_spec: LearnerSpec, groups: list[ScoredGroup]) -> tuple[Weights, list[dict[str, float]]]:
    """ZeRO 0 on one rank."""
    return trained_alone(base_spec, groups)


def assert_same_update(found: Weights, expected: Weights, start: Weights, tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, weight in expected.items():
        update = (weight.double() - start[name].double()).norm()
        assert update > 0, name
        distance = (found[name].double() - weight.double()).norm() / update
        assert distance <= tolerance, f"{name}: the updates differ by {distance:.2g} of their size"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages_and_ranks_give_the_same_weights(
    stage: int,
    world_size: int,
    base_spec: LearnerSpec,
    groups: list[ScoredGroup],
    baseline: tuple[Weights, list[dict[str, float]]],
    start: Weights,
    pair: Pair,
) -> None:
    spec = dataclasses.replace(base_spec, zero_stage=stage)
    weights, metrics = trained_alone(spec, groups) if world_size == 1 else pair.trained(spec, groups)
    assert_same_update(weights, baseline[0], start, FP32_TOLERANCE)
    for one, other in zip(baseline[1], metrics, strict=True):
        for name in ("objective/policy_loss", "objective/kl_loss", "learner/grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    "change",
    [
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 3, "gradient_checkpointing": True, "offload_optimizer": True},
        {"zero_stage": 3, "kl_estimator": "exact_vocabulary"},
        {"zero_stage": 0, "micro_batch_tokens": 16},
    ],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_memory_savers_change_nothing(
    change: dict[str, Any], base_spec: LearnerSpec, groups: list[ScoredGroup], start: Weights, pair: Pair
) -> None:
    spec = dataclasses.replace(base_spec, **change)
    plain = dataclasses.replace(base_spec, kl_estimator=spec.kl_estimator)
    expected = trained_alone(plain, groups)[0]
    assert_same_update(pair.trained(spec, groups)[0], expected, start, FP32_TOLERANCE)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_with_fp32_master_weights(
    stage: int, base_spec: LearnerSpec, groups: list[ScoredGroup], start: Weights, pair: Pair
) -> None:
    spec = dataclasses.replace(base_spec, dtype="bfloat16", zero_stage=stage, learning_rate=1e-2)
    alone, _ = trained_alone(dataclasses.replace(spec, zero_stage=1), groups)
    together, metrics = pair.trained(spec, groups)
    assert all(weight.dtype == torch.bfloat16 for weight in together.values())
    assert metrics[-1]["learner/skipped_steps"] == 0
    flat = [torch.cat([part[name].double().flatten() for name in start]) for part in (together, alone, start)]
    distance = (flat[0] - flat[1]).norm() / (flat[1] - flat[2]).norm()
    assert distance <= BFLOAT16_TOLERANCE, f"the updates differ by {distance:.2g} of their size"


def test_small_steps_add_up_in_bfloat16(base_spec: LearnerSpec, groups: list[ScoredGroup]) -> None:
    """Two steps too small for bf16 leave the weights alone, twenty move them: the master weights add them up."""
    spec = dataclasses.replace(base_spec, dtype="bfloat16", learning_rate=2e-5, kl_coefficient=0.0)
    trainer = Trainer(spec, rank=0)
    start = {name: weight.clone() for name, weight in trainer.weights()}
    norm = "model.norm.weight"  # near 1.0, where bf16 numbers are 2^-7 or 2^-8 apart
    for version in range(20):
        trainer.train(groups, version)
        if version == 1:
            early = dict(trainer.weights())[norm].clone()
    assert torch.equal(early, start[norm])
    late = {name: weight.clone() for name, weight in trainer.weights()}
    changed = sum(int((late[name] != start[name]).sum()) for name in start)
    assert changed > 1000


def test_adapters_publish_merged_weights(base_spec: LearnerSpec, groups: list[ScoredGroup], pair: Pair) -> None:
    """Published weights in the plain model give the adapted model's logits; only adapters were trained."""
    from transformers import AutoModelForCausalLM

    spec = dataclasses.replace(base_spec, lora_rank=4, learning_rate=1e-2)
    trainer = Trainer(spec, rank=0)
    facts = trainer.describe()
    assert facts["num_trainable"] < facts["num_parameters"] / 2
    for version in range(STEPS):
        trainer.train(groups, version)
    merged = {name: weight.clone() for name, weight in trainer.weights()}
    plain = AutoModelForCausalLM.from_pretrained(base_spec.model_path)
    assert set(merged) == set(dict(plain.named_parameters()))
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    assert torch.equal(before["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], merged["model.layers.0.mlp.up_proj.weight"])
    plain.load_state_dict(merged, strict=False)
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trainer.policy.language_model(ids).logits, rtol=1e-5, atol=1e-5)
    for stage in (1, 3):
        together, _ = pair.trained(dataclasses.replace(spec, zero_stage=stage), groups)
        adapted = {name: weight for name, weight in merged.items() if not torch.equal(weight, before[name])}
        assert_same_update({name: together[name] for name in adapted}, adapted, before, FP32_TOLERANCE)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_gradients_of_one_rank_refuse_the_batch_on_all(
    stage: int, base_spec: LearnerSpec, groups: list[ScoredGroup], pair: Pair
) -> None:
    spec = dataclasses.replace(base_spec, zero_stage=stage, mini_batches=1, world_size=2, kl_coefficient=0.0)
    pair.call("begin", spec, pair.master)
    before = pair.call("weights")[0]
    ray.get(pair.ranks[1].set_noise_scale.remote(float("nan")), timeout=60)
    for _ in range(MAX_REFUSED_IN_A_ROW):
        refused = pair.call("refusal", "train", groups, 0)
        assert [type(error) for error in refused] == [NonFiniteGradients, NonFiniteGradients]
    after = pair.call("weights")[0]
    assert all(torch.equal(after[name], before[name]) for name in before)
    ray.get(pair.ranks[1].set_noise_scale.remote(1.0), timeout=60)
    given_up = pair.call("refusal", "train", groups, 0)
    assert all(isinstance(error, LearnerError) and "3 batches in a row" in str(error) for error in given_up)


def test_partitioned_weights_that_find_no_room_are_published_again(
    base_spec: LearnerSpec, start: Weights, pair: Pair
) -> None:
    """The ranks gather all of a version that the object store does not take, and stay in step for the next try."""
    spec = dataclasses.replace(base_spec, zero_stage=3, world_size=2, shard_bytes=4096)
    pair.call("begin", spec, pair.master)
    ray.get(pair.ranks[0].fill_store.remote(), timeout=60)
    group = LearnerGroup(spec, {})
    group._ranks = list(pair.ranks)
    published = asyncio.run(group.publish(1))
    parts = ray.get(list(published.shards), timeout=60)
    found = dict(iterate_weights(published.manifest, parts))
    assert found.keys() == start.keys()
    assert all(torch.equal(found[name], start[name]) for name in start)
