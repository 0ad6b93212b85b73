"""Replay: what a packed pass contains, what is refused, and how a step is cut."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.replay import pack_samples, plan_step, rank_batches, read_groups
from learner.spec import ReplayError, ScoredGroup
from rollout.noise import CounterNoise
from rollout.soft_token import SoftTokenParams, sample_soft_tokens
from rollout.trajectory import Kind, pack, unpack
from tests.learner.handmade import learner_spec, make_group, make_trajectory

SPEC = learner_spec(Path("unused"))
V = 64


def test_rows_score_the_next_position() -> None:
    samples, _ = read_groups([make_group(0, size=2)], SPEC, V)
    batch = pack_samples([dataclasses.replace(s, position_weight=0.5, advantage=1.0) for s in samples], SPEC)
    start = 0
    positions = 0
    for index, sample in enumerate(samples):
        t = sample.trajectory
        prompt, length = len(t.prompt_ids), len(t.response_ids)
        fed = [*t.prompt_ids.tolist(), *t.response_ids.tolist()][:-1]
        assert batch.input_ids[start : start + len(fed)].tolist() == fed
        assert batch.position_ids[start : start + len(fed)].tolist() == list(range(len(fed)))
        mine = batch.sequence == index
        assert batch.rows[mine].tolist() == [start + prompt - 1 + i for i in range(length)]
        assert batch.ids[mine].tolist() == t.response_ids.tolist()
        soft = int((t.kinds == Kind.SOFT).sum())
        rows = batch.mixture_rows
        inside = (rows >= start) & (rows < start + len(fed))
        assert rows[inside].tolist() == [start + prompt + i for i in range(soft)]
        assert torch.equal(batch.mixture_weights[inside], torch.from_numpy(t.weights.copy()))
        start += len(fed)
        positions += length
    assert batch.cu_seqlens.tolist() == [0, samples[0].num_rows, start]
    assert batch.weights.tolist() == [0.5] * positions
    soft_positions = int((batch.kinds == Kind.SOFT).sum())
    assert batch.perturbed.shape == batch.candidate_ids.shape == (soft_positions, 5)
    assert torch.equal(batch.retained, batch.perturbed > -torch.inf)


def test_a_soft_last_token_is_scored_but_never_an_input() -> None:
    t = make_trajectory(np.random.default_rng(0), "g/0", [10], thinking=3)
    cut = dataclasses.replace(
        t,
        response_ids=t.response_ids[:3],
        kinds=t.kinds[:3],
        versions=t.versions[:3],
        log_density=t.log_density[:3],
        finish_reason="length",
    )
    samples, refusals = read_groups([ScoredGroup("g", pack([cut]), (0.0,), (True,))], SPEC, V)
    assert not refusals
    batch = pack_samples(samples, SPEC)
    assert len(batch.mixture_rows) == 2
    assert len(batch.rows) == len(batch.candidate_ids) == 3


def test_temperatures_follow_the_kind_and_forced_positions_are_left_out() -> None:
    spec = dataclasses.replace(SPEC, temperature=0.7, answer_temperature=1.3)
    t = make_trajectory(np.random.default_rng(0), "g/0", [10, 11], thinking=2)
    forced = dataclasses.replace(t, kinds=np.where(t.kinds == Kind.ENDED, Kind.FORCED, t.kinds).astype(np.uint8))
    samples, _ = read_groups([ScoredGroup("g", pack([t, forced]), (0.0, 1.0), (True, True))], spec, V)
    batch = pack_samples(samples, spec)
    expected = [0.7, 0.7, 0.7, 1.3, 1.3, 1.3, 0.7, 0.7, 1.3, 1.3, 1.3]
    assert batch.temperature.tolist() == pytest.approx(expected)
    control = dataclasses.replace(spec, likelihood="none")
    samples, _ = read_groups([ScoredGroup("g", pack([t]), (0.0,), (True,))], control, V)
    assert pack_samples(samples, control).kinds.tolist() == [Kind.ENDED] + [Kind.DISCRETE] * 3


def test_what_was_perturbed_is_rebuilt_to_the_bit() -> None:
    """At delta 1 the threshold is the heaviest value itself: one bit off, and no candidate is left."""
    count = 200
    logits = torch.randn(count, V, generator=torch.Generator().manual_seed(0))
    params = SoftTokenParams(noise_scale=0.7, censor_delta=1.0)
    drawn = sample_soft_tokens(logits, params, CounterNoise(torch.arange(count), torch.zeros(count, dtype=torch.int64)))
    assert drawn.threshold is not None
    t = dataclasses.replace(
        make_trajectory(np.random.default_rng(0), "g/0", [10], thinking=count),
        candidate_ids=drawn.ids.numpy(),
        candidate_logprobs=drawn.logprobs.numpy(),
        noise=drawn.noise.numpy(),
        weights=drawn.weights.numpy(),
        censor_threshold=drawn.threshold.numpy(),
    )
    spec = dataclasses.replace(SPEC, noise_scale=0.7, max_new_tokens=2 * count)
    (sample,), _ = read_groups([ScoredGroup("g", pack([t]), (0.0,), (True,))], spec, V)
    batch = pack_samples([sample], spec)
    assert torch.equal(batch.perturbed, drawn.perturbed)
    assert torch.equal((batch.perturbed >= batch.threshold[:, None]).sum(1), torch.ones(count, dtype=torch.int64))


def test_the_noise_is_added_at_its_scale() -> None:
    spec = dataclasses.replace(SPEC, noise_scale=0.5)
    (sample,), _ = read_groups([make_group(0, size=1)], spec, V)
    t = sample.trajectory
    expected = np.where(np.isfinite(t.candidate_logprobs), t.candidate_logprobs + 0.5 * t.noise, -np.inf)
    np.testing.assert_allclose(pack_samples([sample], spec).perturbed, expected, rtol=1e-6)


@pytest.mark.parametrize("family", ["gaussian", "dirichlet"])
def test_raw_draws_are_replayed_as_they_are(family: str) -> None:
    spec = dataclasses.replace(SPEC, noise=family, noise_scale=0.5)
    (sample,), _ = read_groups([make_group(0, size=1)], spec, V)
    present = np.isfinite(sample.trajectory.candidate_logprobs)
    perturbed = pack_samples([sample], spec).perturbed.numpy()
    np.testing.assert_array_equal(perturbed, np.where(present, sample.trajectory.noise, -np.inf))


@pytest.mark.parametrize(("estimator", "first"), [("grpo", 0.5 / (1 / 3) ** 0.5), ("dr_grpo", 0.5), ("rloo", 2 / 3)])
def test_the_estimator_is_the_one_asked_for(estimator: str, first: float) -> None:
    (samples,) = plan_step([make_group(0)], dataclasses.replace(SPEC, advantage=estimator), V).mini_batches
    assert samples[0].advantage == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean", "constant"])
def test_the_aggregation_is_the_one_asked_for(kind: str) -> None:
    spec = dataclasses.replace(SPEC, aggregation=kind, max_new_tokens=50)
    (samples,) = plan_step([make_group(0)], spec, V).mini_batches
    lengths = [int(sample.scored.sum()) for sample in samples]
    assert len(set(lengths)) > 1
    expected = {
        "token_mean": [1 / sum(lengths)] * 4,
        "sequence_mean": [1 / (4 * length) for length in lengths],
        "constant": [1 / (4 * 50)] * 4,
    }
    assert [sample.position_weight for sample in samples] == pytest.approx(expected[kind])


def test_bad_rows_are_named_and_the_rest_kept() -> None:
    group = make_group(0, size=5)
    rows = unpack(group.batch)  # type: ignore[arg-type]
    noise, ids = rows[1].noise.copy(), rows[2].candidate_ids.copy()
    noise[0, 0], ids[0, 1] = np.nan, V
    rows[1] = dataclasses.replace(rows[1], noise=noise)
    rows[2] = dataclasses.replace(rows[2], candidate_ids=ids)
    rows[3] = dataclasses.replace(rows[3], prompt_ids=rows[3].prompt_ids[:0])
    bad = dataclasses.replace(group, batch=pack(rows), rewards=(1.0, 0.0, 1.0, 0.0, float("nan")))
    samples, refusals = read_groups([bad, make_group(1)], SPEC, V)
    assert samples[0].trajectory.request_id == "prompt0@0/0"
    assert [sample.reward for sample in samples] == [1.0, 1.0, 0.0, 1.0, 0.0]
    found = "\n".join(refusals)
    assert len(refusals) == 4
    for expected in ("0/1: column noise", "0/2: column candidate_ids", "0/3: column prompt_ids", "0/4: reward nan"):
        assert expected in found
    _, refusals = read_groups([group], dataclasses.replace(SPEC, max_new_tokens=4), V)
    assert len(refusals) == 5 and "1 to 4 expected" in refusals[0]
    _, refusals = read_groups([make_group(1, candidates=6)], SPEC, V)
    assert len(refusals) == 4 and "column candidate_ids: 6 candidates" in refusals[0]


def test_the_faithful_mode_keeps_filtered_candidates_in_the_mixture() -> None:
    t = make_trajectory(np.random.default_rng(0), "g/0", [10], thinking=2)
    logprobs = np.where(np.isfinite(t.candidate_logprobs), t.candidate_logprobs, np.log(1e-6)).astype(np.float32)
    group = ScoredGroup("g", pack([dataclasses.replace(t, candidate_logprobs=logprobs)]), (0.0,), (True,))
    spec = dataclasses.replace(SPEC, log_epsilon=1e-6, likelihood="reference")
    batch = pack_samples(read_groups([group], spec, V)[0], spec)
    assert torch.equal(batch.retained, torch.from_numpy(np.isfinite(t.candidate_logprobs)))
    assert torch.isfinite(batch.perturbed).all()


def test_a_batch_of_another_schema_version_is_refused_and_the_rest_kept() -> None:
    good, bad = make_group(0), make_group(1)
    metadata = {**bad.batch.schema.metadata, b"softgrpo.schema_version": b"99"}  # type: ignore[union-attr]
    bad = dataclasses.replace(bad, batch=bad.batch.replace_schema_metadata(metadata))  # type: ignore[union-attr]
    plan = plan_step([bad, good], SPEC, V)
    assert len(plan.refusals) == 4 and "schema version 99" in plan.refusals[0]
    assert plan.metrics["learner/refused_trajectories"] == 4
    assert plan.metrics["learner/trajectories"] == 4
    with pytest.raises(ReplayError, match="none of the 1 groups"):
        plan_step([bad], SPEC, V)


def test_rows_that_are_not_kept_leave_the_group_statistics() -> None:
    group = dataclasses.replace(make_group(0), rewards=(1.0, 0.0, 1.0, 0.0), keep=(True, False, True, False))
    plan = plan_step([group], SPEC, V)
    assert [sample.advantage for sample in plan.mini_batches[0]] == [0.0, 0.0]
    assert plan.metrics["learner/zero_advantage_groups"] == 1
    with pytest.raises(ReplayError, match="3 rewards"):
        plan_step([dataclasses.replace(group, rewards=(1.0, 0.0, 1.0))], SPEC, V)


def test_mini_batches_never_split_a_group() -> None:
    plan = plan_step([make_group(seed) for seed in range(5)], dataclasses.replace(SPEC, mini_batches=2), V)
    members = [sorted({sample.group for sample in part}) for part in plan.mini_batches]
    assert members == [[0, 1, 2], [3, 4]]
    for part in plan.mini_batches:
        total = sum(sample.position_weight * int(sample.scored.sum()) for sample in part)
        assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_a_mini_batch_exactly(world_size: int) -> None:
    spec = dataclasses.replace(SPEC, world_size=world_size, micro_batch_tokens=40)
    samples = plan_step([make_group(seed) for seed in range(3)], spec, V).mini_batches[0]
    shares = [rank_batches(samples, spec, rank) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    total = sum(float(batch.weights.double().sum()) for share in shares for batch in share)
    assert total == pytest.approx(1.0, abs=1e-6)
    sequences = sum(len(batch.cu_seqlens) - 1 for share in shares for batch in share if batch.weights.any())
    assert sequences == len(samples)


def test_samples_without_a_gradient_are_left_out_unless_kl_or_entropy_need_them() -> None:
    flat = dataclasses.replace(make_group(0), rewards=(1.0,) * 4)
    for change, expected in (({}, 4), ({"kl_coefficient": 0.1}, 8), ({"entropy_bonus": 0.1}, 8)):
        spec = dataclasses.replace(SPEC, **change)  # type: ignore[arg-type]
        samples = plan_step([flat, make_group(1)], spec, V).mini_batches[0]
        batches = rank_batches(samples, spec, 0)
        assert sum(len(batch.cu_seqlens) - 1 for batch in batches) == expected
    only_flat = plan_step([flat], SPEC, V).mini_batches[0]
    (idle,) = rank_batches(only_flat, SPEC, 0)
    assert len(idle.rows) and not idle.weights.any() and not idle.advantages.any()
