"""One learner rank in this process: what a step does, what is published, saved and exported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from learner.actor import LearnerRank
from learner.likelihood import soft_log_ratio
from learner.objective import objective
from learner.replay import Sample, plan_step
from learner.spec import LearnerError, NonFiniteGradients, ReplayError, ScoredGroup
from learner.trainer import Trainer
from rollout.trajectory import Kind, pack, unpack
from rollout.transport import Link
from tests.learner.handmade import LAYERS, count_layer_runs, learner_spec, make_group

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_rank")]


def answer_log_prob(trainer: Trainer, group: ScoredGroup, row: int) -> float:
    """Log-probability of the discrete answer of one trajectory, fed as plain tokens."""
    t = unpack(group.batch)[row]  # type: ignore[arg-type]
    ids = torch.tensor([*t.prompt_ids.tolist(), *t.response_ids.tolist()])
    with torch.no_grad():
        logits = trainer.policy.language_model(ids[None, :-1]).logits[0]
    log_probs = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return log_probs[-3:].sum().item()


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.weights()}


def test_steps_raise_the_probability_of_what_was_rewarded(tiny_model_dir: Path) -> None:
    trainer = Trainer(learner_spec(tiny_model_dir), rank=0)
    groups = [make_group(seed) for seed in range(3)]
    before = [answer_log_prob(trainer, groups[0], row) for row in (0, 1)]
    first = trainer.train(groups, 0)
    for version in range(1, 4):
        trainer.train(groups, version)
    after = [answer_log_prob(trainer, groups[0], row) for row in (0, 1)]
    assert after[0] > before[0] + 0.05
    assert after[1] < before[1] - 0.05
    assert first["reward/mean"] == 0.5
    assert first["learner/grad_norm"] > 0
    assert first["learner/zero_advantage_groups"] == 0
    assert first["objective/ratio_mean_thinking"] == first["objective/ratio_max"] == 1.0
    assert all(math.isfinite(value) for value in first.values())


def test_time_and_memory_of_every_pass_are_metrics(tiny_model_dir: Path) -> None:
    groups = [make_group(seed) for seed in range(3)]
    metrics = Trainer(learner_spec(tiny_model_dir, micro_batch_tokens=40), rank=0).train(groups, 0)
    assert metrics["learner/passes"] >= 3
    assert 0 < metrics["learner/pass_s_mean"] <= metrics["learner/pass_s_max"] < metrics["learner/update_s"]
    assert metrics["learner/passes"] * metrics["learner/pass_s_mean"] < metrics["learner/update_s"]
    assert 50 < metrics["learner/pass_memory_mb_max"] < 50_000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_keeps_master_weights_and_moments_on_the_host(stage: int, tiny_model_dir: Path) -> None:
    """What DeepSpeed was told, and what it holds; that the weights stay the same is for `test_zero_stages`."""
    spec = learner_spec(tiny_model_dir, zero_stage=stage, offload_optimizer=True, dtype="bfloat16")
    trainer = Trainer(spec, rank=0)
    trainer.train([make_group(0)], 0)
    optimizer = trainer.engine.optimizer
    assert optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload
    groups = [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
    held = list(optimizer.fp32_partitioned_groups_flat) if stage == 3 else groups
    moments = [state["exp_avg"] for state in optimizer.optimizer.state.values()]
    assert held and len(moments) == len(held)
    assert all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in [*held, *moments])


def naive_gradient_norm(model_dir: Path, samples: Sequence[Sample], answer_temperature: float) -> float:
    """The first step's gradient, sequence by sequence, with the full logits of a plain transformers model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    table = model.get_input_embeddings().weight
    loss = torch.zeros(())
    for sample in samples:
        t = sample.trajectory
        ids = torch.tensor([*t.prompt_ids.tolist(), *t.response_ids.tolist()])
        inputs = list(table[ids[:-1]])
        prompt, soft = len(t.prompt_ids), [i for i, kind in enumerate(t.kinds) if kind == Kind.SOFT]
        for row, position in enumerate(soft):
            mixture = (
                torch.tensor(t.weights[row]) @ table.detach()[torch.tensor(t.candidate_ids[row], dtype=torch.int64)]
            )
            inputs[prompt + position] = mixture
        logits = model(inputs_embeds=torch.stack(inputs)[None]).logits[0, prompt - 1 :]
        discrete = torch.tensor(t.kinds == Kind.DISCRETE)
        logits = logits / torch.where(discrete, answer_temperature, 1.0)[:, None]
        log_ratio = logits.log_softmax(-1).gather(-1, ids[prompt:, None])[:, 0]
        log_ratio = log_ratio - log_ratio.detach()
        candidates = logits[soft].gather(-1, torch.tensor(t.candidate_ids, dtype=torch.int64))
        at_soft = soft_log_ratio(
            candidates,
            candidates.detach(),
            torch.tensor(t.candidate_logprobs + t.noise),
            torch.tensor(np.isfinite(t.candidate_logprobs)),
            likelihood="censored",
            threshold=torch.tensor(t.censor_threshold),
        )
        log_ratio = log_ratio.index_copy(0, torch.tensor(soft), at_soft)
        loss = loss - (sample.advantage * sample.position_weight * log_ratio.exp()).sum()
    loss.backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize(
    ("stage", "gradient_checkpointing"), [(0, False), (0, True), (1, True), (2, True), (3, False), (3, True)]
)
def test_the_gradient_is_that_of_a_naive_loop(tiny_model_dir: Path, stage: int, gradient_checkpointing: bool) -> None:
    spec = learner_spec(
        tiny_model_dir,
        answer_temperature=1.3,
        aggregation="sequence_mean",
        zero_stage=stage,
        gradient_checkpointing=gradient_checkpointing,
    )
    groups = [make_group(seed) for seed in range(2)]
    (samples,) = plan_step(groups, spec, 64).mini_batches
    expected = naive_gradient_norm(tiny_model_dir, samples, 1.3)
    trainer = Trainer(spec, rank=0)
    runs = count_layer_runs(trainer.policy)
    metrics = trainer.train(groups, 0)
    assert metrics["learner/grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert len(runs) == LAYERS * metrics["learner/passes"] * (2 if gradient_checkpointing else 1)


def test_steps_must_follow_each_other(tiny_model_dir: Path) -> None:
    trainer = Trainer(learner_spec(tiny_model_dir), rank=0)
    trainer.train([make_group(0)], 0)
    with pytest.raises(LearnerError, match="asked to train step 0, the learner is at step 1"):
        trainer.train([make_group(0)], 0)


def test_kl_pulls_back_to_the_start(tiny_model_dir: Path) -> None:
    """With equal rewards only the KL acts: after a disturbance the policy moves back towards the reference."""
    distances = {}
    for coefficient in (0.0, 1.0):
        trainer = Trainer(learner_spec(tiny_model_dir, kl_coefficient=coefficient, kl_estimator="exact"), rank=0)
        start = weights_of(trainer)
        flat = [dataclasses.replace(make_group(seed), rewards=(1.0,) * 4) for seed in range(2)]
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in trainer.policy.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        metrics = [trainer.train(flat, version) for version in range(4)]
        assert metrics[0]["learner/zero_advantage_groups"] == 2
        distances[coefficient] = (
            metrics[-1].get("objective/kl_thinking", 0.0),
            metrics[0].get("objective/kl_thinking", 0.0),
        )
        assert set(weights_of(trainer)) == set(start)
    last, first = distances[1.0]
    assert 0 < last < first
    assert distances[0.0] == (0.0, 0.0)


def test_refused_trajectories_are_named_and_the_rest_trains(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(learner_spec(tiny_model_dir), rank=0)
    good = make_group(0, size=5)
    rows = unpack(good.batch)  # type: ignore[arg-type]
    noise = rows[1].noise.copy()
    noise[0, 0] = np.nan
    ids = rows[2].candidate_ids.copy()
    ids[0, 1] = 64
    rows[1] = dataclasses.replace(rows[1], noise=noise)
    rows[2] = dataclasses.replace(rows[2], candidate_ids=ids)
    metrics = trainer.train([dataclasses.replace(good, batch=pack(rows))], 0)
    assert metrics["learner/refused_trajectories"] == 2
    assert metrics["learner/trajectories"] == 3
    assert "prompt0@0/1: column noise" in caplog.text
    assert "prompt0@0/2: column candidate_ids" in caplog.text
    with pytest.raises(ReplayError, match="column noise"):
        trainer.train([ScoredGroup("g", pack(rows[1:2]), (1.0,), (True,))], 1)
    assert trainer.steps == 1


def test_non_finite_gradients_refuse_the_batch(tiny_model_dir: Path) -> None:
    for stage in (0, 1):
        trainer = Trainer(learner_spec(tiny_model_dir, zero_stage=stage), rank=0)
        trainer.train([make_group(0)], 0)
        before = weights_of(trainer)
        settings = trainer.settings
        trainer.settings = dataclasses.replace(settings, noise_scale=float("nan"))
        with pytest.raises(NonFiniteGradients, match="step 1: gradients of all 1 mini-batches are not finite"):
            trainer.train([make_group(1)], 1)
        assert trainer.steps == 1
        assert all(torch.equal(before[name], weight) for name, weight in weights_of(trainer).items())
        trainer.settings = settings
        assert trainer.train([make_group(1)], 1)["learner/skipped_steps"] == 0
        assert not torch.equal(before["model.norm.weight"], weights_of(trainer)["model.norm.weight"])


def test_one_mini_batch_without_finite_gradients_is_skipped_and_counted(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(learner_spec(tiny_model_dir, mini_batches=2), rank=0)
    calls: list[int] = []

    def spoilt(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        loss, statistics = objective(*arguments, **options)
        return loss * (math.nan if len(calls) == 1 else 1.0), statistics

    monkeypatch.setattr("learner.trainer.objective", spoilt)
    metrics = trainer.train([make_group(seed) for seed in range(2)], 0)
    assert (metrics["learner/skipped_steps"], metrics["learner/optimizer_steps"]) == (1, 1)
    assert all(weight.isfinite().all() for weight in weights_of(trainer).values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_never_published(tiny_model_dir: Path, bad: float) -> None:
    """The parts may travel, but without the link there is no version."""
    rank = LearnerRank(learner_spec(tiny_model_dir), rank=0)
    rank._trainer = Trainer(rank.spec, rank=0)
    *_, link = rank.publish(1)
    assert isinstance(link, Link) and link.manifest.version == 1
    with torch.no_grad():
        dict(rank.trainer.policy.language_model.named_parameters())["model.norm.weight"][3] = bad
    sent = []
    with pytest.raises(LearnerError, match=r"version 2 is not published: model.norm.weight and 0 more of"):
        sent.extend(rank.publish(2))
    assert not any(isinstance(part, Link) for part in sent)


def test_a_publication_that_is_given_up_gathers_the_rest(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks gather every tensor with this one; memory goes back as after a whole publication."""
    rank = LearnerRank(learner_spec(tiny_model_dir, shard_bytes=4096, shares_device=True), rank=0)
    rank._trainer = Trainer(rank.spec, rank=0)
    weights, gathered = rank.trainer.weights, []

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in weights():
            gathered.append(name)
            yield name, weight

    monkeypatch.setattr(rank.trainer, "weights", counted)
    monkeypatch.setattr(rank, "_give_memory_back", lambda: gathered.append("back"))
    expected = [*(name for name, _ in weights()), "back"]
    parts = rank.publish(1)
    next(parts)
    assert len(gathered) < len(expected) / 2
    parts.close()  # type: ignore[attr-defined]
    assert gathered == expected
    *_, link = rank.publish(1)
    assert isinstance(link, Link) and link.base_version is None
    assert gathered == [*expected, *expected]


@pytest.mark.parametrize("shares", [True, False])
def test_a_refused_step_gives_the_engines_memory_back(
    shares: bool, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes with the old version; after a step that was made, publishing does that."""
    given: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append("back"))
    rank = LearnerRank(learner_spec(tiny_model_dir, shares_device=shares), rank=0)

    def refuse(groups: object, step: int) -> dict[str, float]:
        if step:
            raise NonFiniteGradients("step 1: nan")
        return {}

    rank._trainer = SimpleNamespace(train=refuse)  # type: ignore[assignment]
    assert rank.train(0) == {} and not given
    with pytest.raises(NonFiniteGradients):
        rank.train(1)
    assert given == (["back"] if shares else [])


def test_save_and_load_continue_the_same_curve(tiny_model_dir: Path, tmp_path: Path) -> None:
    spec = learner_spec(tiny_model_dir, mini_batches=2, zero_stage=1)
    groups = [make_group(seed) for seed in range(4)]
    trainer = Trainer(spec, rank=0)
    trainer.train(groups, 0)
    trainer.save(tmp_path)
    uninterrupted = [trainer.train(groups, version) for version in (1, 2)]
    resumed = Trainer(spec, rank=0, checkpoint=tmp_path)
    assert resumed.steps == 1
    again = [resumed.train(groups, version) for version in (1, 2)]
    for expected, found in zip(uninterrupted, again, strict=True):
        assert found["objective/policy_loss"] == expected["objective/policy_loss"]
        assert found["learner/grad_norm"] == expected["learner/grad_norm"]
    weights = weights_of(resumed)
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(trainer).items())


def test_mismatch_is_measured_before_the_step(tiny_model_dir: Path) -> None:
    """Without old scores only the first mini-batch knows the policy that the engine should have had."""
    groups = [make_group(seed) for seed in range(4)]
    for old in ("recompute", "behaviour"):
        found = []
        for rate in (1e-12, 0.05):
            spec = learner_spec(tiny_model_dir, mini_batches=2, old_log_density=old, learning_rate=rate)
            found.append(Trainer(spec, rank=0).train(groups, 0))
        for name in ("mismatch/kl_thinking", "mismatch/kl_answer", "mismatch/max_answer"):
            assert found[0][name] > 0
            assert found[1][name] == pytest.approx(found[0][name], rel=1e-4), (old, name)


def test_without_positions_in_the_first_mini_batch_no_mismatch_is_reported(tiny_model_dir: Path) -> None:
    """Equal rewards train nothing; the gap of the second mini-batch includes the step of the first."""
    equal = dataclasses.replace(make_group(0), rewards=(1.0,) * 4)
    spec = learner_spec(tiny_model_dir, mini_batches=2, old_log_density="behaviour")
    metrics = Trainer(spec, rank=0).train([equal, make_group(1)], 0)
    assert metrics["objective/positions_thinking"] > 0
    assert [name for name in metrics if name.startswith("mismatch/")] == []
    assert metrics["learner/oldest_version"] == 0


@pytest.mark.parametrize(("tied", "lora_rank"), [(True, None), (False, None), (True, 4)])
def test_export_loads_in_transformers(tied: bool, lora_rank: int | None, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.conftest import build_tiny_model

    spec = learner_spec(build_tiny_model(tmp_path / "model", tied=tied), lora_rank=lora_rank, learning_rate=1e-2)
    trainer = Trainer(spec, rank=0)
    trainer.train([make_group(0)], 0)
    trainer.export(tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        expected = trainer.policy.language_model(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0 if lora_rank is None else 1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template
    published = {name for name, _ in trainer.weights()}
    assert ("lm_head.weight" in published) is not tied
