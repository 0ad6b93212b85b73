"""From scored groups to packed passes: check, advantage, mini-batches, shares of the ranks.

    ScoredGroup --read_groups--> Sample --plan_step--> mini-batches --rank_batches--> ReplayBatch per pass

Every rank reads all groups (zero-copy) and computes the same plan, so nothing but the gradient crosses ranks.
Invariants: a group is never split over mini-batches; advantages and aggregation weights are those of the whole step
and mini-batch before anything is cut; every rank runs the same number of passes (the ZeRO collectives need it).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from learner.advantage import group_advantage
from learner.aggregation import sequence_weights
from learner.packing import ReplayBatch, plan_packs
from learner.spec import LearnerSpec, ReplayError, ScoredGroup
from rollout.trajectory import Kind, Trajectory, TrajectoryError, unpack

logger = logging.getLogger(__name__)

WEIGHT_SUM_TOLERANCE = 1e-3
"""Soft-token weights are a softmax in fp32: rows sum to 1 within rounding, anything else is corruption."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One response that trains."""

    trajectory: Trajectory
    group: int
    """Index of its group in the step."""
    reward: float
    advantage: float
    scored: np.ndarray
    """[T] bool: positions that belong to the objective (zero advantage or not)"""
    position_weight: float = 0.0
    """Aggregation weight of each of its positions in its mini-batch."""

    @property
    def num_rows(self) -> int:
        """Input rows of the packed pass: prompt and response without the last token."""
        return len(self.trajectory.prompt_ids) + len(self.trajectory.response_ids) - 1


@dataclass(frozen=True)
class StepPlan:
    """One training step: what is trained, in which mini-batch, and what was refused."""

    mini_batches: tuple[tuple[Sample, ...], ...]
    refusals: tuple[str, ...]
    """One message per refused trajectory: its id, the column, what is wrong."""
    metrics: dict[str, float]


def plan_step(groups: Sequence[ScoredGroup], spec: LearnerSpec, vocab_size: int) -> StepPlan:
    """Check the trajectories of resolved groups, compute advantages and cut the step into mini-batches.

    Raises `ReplayError` if rewards do not fit the rows or no trajectory is left.
    """
    samples, refusals = read_groups(groups, spec, vocab_size)
    for refusal in refusals:
        logger.warning("trajectory refused: %s", refusal)
    if not samples:
        raise ReplayError(f"none of the {len(groups)} groups has a trajectory to train on: {'; '.join(refusals[:3])}")
    rewards = torch.tensor([sample.reward for sample in samples])
    members = torch.tensor([sample.group for sample in samples])
    advantages = group_advantage(rewards, members, estimator=spec.advantage).tolist()  # type: ignore[arg-type]
    samples = [replace(sample, advantage=value) for sample, value in zip(samples, advantages, strict=True)]
    mini_batches = tuple(_weighted(part, spec) for part in _split_groups(samples, spec.mini_batches))
    return StepPlan(mini_batches, tuple(refusals), _step_metrics(samples, refusals))


def read_groups(groups: Sequence[ScoredGroup], spec: LearnerSpec, vocab_size: int) -> tuple[list[Sample], list[str]]:
    """The kept, valid responses in order (advantage still 0), and one message per refused one."""
    samples: list[Sample] = []
    refusals: list[str] = []
    for index, group in enumerate(groups):
        batch = group.batch
        if not isinstance(batch, pa.RecordBatch | pa.Table):
            raise ReplayError(f"group {group.group_id}: expected an Arrow batch, found {type(batch).__name__}")
        if not len(group.rewards) == len(group.keep) == batch.num_rows:
            raise ReplayError(
                f"group {group.group_id}: {len(group.rewards)} rewards and {len(group.keep)} keep flags "
                f"for {batch.num_rows} trajectories"
            )
        try:
            trajectories = unpack(batch)
        except TrajectoryError as error:
            refusals += [f"group {group.group_id} row {row}: {error}" for row in range(batch.num_rows)]
            continue
        for trajectory, reward, keep in zip(trajectories, group.rewards, group.keep, strict=True):
            try:
                check_trajectory(trajectory, spec, vocab_size)
                if not np.isfinite(reward):
                    raise TrajectoryError(f"trajectory {trajectory.request_id}: column reward: {reward}")
            except TrajectoryError as error:
                refusals.append(str(error))
                continue
            if keep:
                samples.append(Sample(trajectory, index, reward, 0.0, _scored(trajectory, spec)))
    return samples, refusals


def check_trajectory(trajectory: Trajectory, spec: LearnerSpec, vocab_size: int) -> None:
    """Raises `TrajectoryError`, naming trajectory and column, for anything that could not be replayed exactly."""

    def require(good: bool | np.bool_, column: str, problem: str) -> None:
        if not good:
            raise TrajectoryError(f"trajectory {trajectory.request_id}: column {column}: {problem}")

    t = trajectory
    length = len(t.response_ids)
    require(len(t.prompt_ids) > 0, "prompt_ids", "empty")
    require(length > 0, "response_ids", "empty")
    require(length <= spec.max_new_tokens, "response_ids", f"{length} tokens, at most {spec.max_new_tokens} expected")
    require(len(t.kinds) == length, "kind_runs", f"{len(t.kinds)} positions for {length} tokens")
    require(len(t.versions) == length, "version_runs", f"{len(t.versions)} positions for {length} tokens")
    require(len(t.log_density) == length, "log_density", f"{len(t.log_density)} values for {length} tokens")
    require(np.isin(t.kinds, list(Kind)).all(), "kind_runs", "a kind that this schema does not have")
    soft, width = int((t.kinds == Kind.SOFT).sum()), t.candidate_ids.shape[-1]
    require(width <= spec.max_candidates, "candidate_ids", f"{width} candidates, {spec.max_candidates} configured")
    for column in ("candidate_ids", "candidate_logprobs", "noise", "weights", "censor_threshold"):
        found = len(getattr(t, column))
        require(found == soft, column, f"{found} rows for {soft} soft positions")
    for column in ("prompt_ids", "response_ids", "candidate_ids"):
        ids = getattr(t, column)
        inside = not ids.size or (ids.min() >= 0 and ids.max() < vocab_size)
        require(inside, column, f"an id outside the vocabulary of {vocab_size}")
    require(np.isfinite(t.log_density).all(), "log_density", "not finite")
    require(not np.isnan(t.candidate_logprobs).any(), "candidate_logprobs", "NaN")
    require((t.candidate_logprobs < np.inf).all(), "candidate_logprobs", "+inf")
    require(np.isfinite(t.candidate_logprobs).any(-1).all(), "candidate_logprobs", "a position without candidates")
    require(np.isfinite(t.noise).all(), "noise", "not finite")
    require(np.isfinite(t.weights).all() and (t.weights >= 0).all(), "weights", "negative or not finite")
    sums = t.weights.sum(-1)
    require((np.abs(sums - 1) <= WEIGHT_SUM_TOLERANCE).all(), "weights", "a mixture that does not sum to 1")


def rank_batches(samples: Sequence[Sample], spec: LearnerSpec, rank: int) -> list[ReplayBatch]:
    """The packed passes of one rank for a mini-batch; every rank has the same number of them.

    Samples without a gradient are left out. A pass that exists only to keep the ranks in step repeats the shortest
    sample with weight 0.
    """
    active = [sample for sample in samples if sample.advantage != 0 or needs_all_samples(spec)]
    plan = plan_packs(
        [sample.num_rows for sample in active], token_budget=spec.micro_batch_tokens, num_ranks=spec.world_size
    )
    shortest = min(samples, key=lambda sample: sample.num_rows)
    idle = [replace(shortest, advantage=0.0, position_weight=0.0)]
    return [pack_samples([active[i] for i in chosen] or idle, spec) for chosen in plan[rank]]


def pack_samples(samples: Sequence[Sample], spec: LearnerSpec) -> ReplayBatch:
    """One packed pass of whole sequences, in the given order."""
    starts = np.cumsum([0, *(sample.num_rows for sample in samples)])
    pieces = [_rows_of(sample, int(start), i, spec) for i, (sample, start) in enumerate(zip(samples, starts))]  # noqa: B905
    joined = {name: torch.from_numpy(np.concatenate([piece[name] for piece in pieces])) for name in pieces[0]}
    return ReplayBatch(cu_seqlens=torch.from_numpy(starts.astype(np.int32)), **joined)


def _rows_of(sample: Sample, start: int, index: int, spec: LearnerSpec) -> dict[str, np.ndarray]:
    """The fields of `ReplayBatch` that one sequence contributes, its rows beginning at `start`."""
    t = sample.trajectory
    prompt, length = len(t.prompt_ids), len(t.response_ids)
    soft = t.kinds == Kind.SOFT
    candidates = _candidates(t, spec)
    mixed = soft[: length - 1]  # the last token is scored but never an input
    num_mixed = int(mixed.sum())
    scored = sample.scored
    scored_soft = scored[soft]
    kinds = t.kinds[scored]
    count = int(scored.sum())
    return {
        "input_ids": np.concatenate([t.prompt_ids, t.response_ids[:-1]]).astype(np.int64),
        "position_ids": np.arange(sample.num_rows),
        "mixture_rows": start + prompt + np.flatnonzero(mixed),
        "mixture_ids": candidates["candidate_ids"][:num_mixed],
        "mixture_weights": candidates["weights"][:num_mixed],
        "rows": start + prompt - 1 + np.flatnonzero(scored),
        "sequence": np.full(count, index, np.int64),
        "kinds": kinds.astype(np.uint8),
        "ids": t.response_ids[scored].astype(np.int64),
        "temperature": np.where(kinds == Kind.DISCRETE, spec.answer_temperature, spec.temperature).astype(np.float32),
        "advantages": np.full(count, sample.advantage, np.float32),
        "weights": np.full(count, sample.position_weight, np.float32),
        "behaviour_log_prob": t.log_density[scored].astype(np.float32),
        "candidate_ids": candidates["candidate_ids"][scored_soft],
        "perturbed": candidates["perturbed"][scored_soft],
        "retained": candidates["retained"][scored_soft],
        "threshold": t.censor_threshold[scored_soft].astype(np.float32),
        "behaviour_logprobs": candidates["candidate_logprobs"][scored_soft],
        "top_weight": candidates["weights"][scored_soft].max(-1, initial=0.0),
    }


def _candidates(t: Trajectory, spec: LearnerSpec) -> dict[str, np.ndarray]:
    """The [S, K] columns padded to the configured K: an absent candidate has id 0, weight 0 and log-prob -inf."""
    missing = ((0, 0), (0, spec.max_candidates - t.candidate_ids.shape[-1]))
    logprobs = np.pad(t.candidate_logprobs.astype(np.float32), missing, constant_values=-np.inf)
    noise = np.pad(t.noise.astype(np.float32), missing)
    present = logprobs > -np.inf
    raw = spec.noise in ("gaussian", "dirichlet")
    perturbed = noise if raw else logprobs + np.float32(spec.noise_scale) * noise
    # In the faithful mode filtered candidates stay in the mixture at log(epsilon).
    floor = np.log(spec.log_epsilon) + 1e-3 if spec.log_epsilon > 0 else -np.inf
    return {
        "candidate_ids": np.pad(t.candidate_ids.astype(np.int64), missing),
        "candidate_logprobs": logprobs,
        "weights": np.pad(t.weights.astype(np.float32), missing),
        "perturbed": np.where(present, perturbed, -np.inf).astype(np.float32),
        "retained": logprobs > floor,
    }


def needs_all_samples(spec: LearnerSpec) -> bool:
    """Whether samples of zero advantage have a gradient too."""
    return spec.kl_coefficient > 0 or spec.entropy_bonus > 0


def _scored(trajectory: Trajectory, spec: LearnerSpec) -> np.ndarray:
    scored = trajectory.kinds != Kind.FORCED
    return scored & (trajectory.kinds != Kind.SOFT) if spec.likelihood == "none" else scored


def _split_groups(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Contiguous parts with equally many groups; fewer parts if there are fewer groups."""
    order = list(dict.fromkeys(sample.group for sample in samples))
    chunks = [set(chunk.tolist()) for chunk in np.array_split(order, min(parts, len(order)))]
    return [[sample for sample in samples if sample.group in chunk] for chunk in chunks]


def _weighted(samples: Sequence[Sample], spec: LearnerSpec) -> tuple[Sample, ...]:
    lengths = torch.tensor([int(sample.scored.sum()) for sample in samples])
    kind = spec.aggregation
    weights: Tensor = sequence_weights(lengths, kind=kind, constant_length=spec.max_new_tokens)  # type: ignore[arg-type]
    return tuple(replace(s, position_weight=w) for s, w in zip(samples, weights.tolist(), strict=True))


def _step_metrics(samples: Sequence[Sample], refusals: Sequence[str]) -> dict[str, float]:
    rewards = np.array([sample.reward for sample in samples])
    lengths = np.array([len(sample.trajectory.response_ids) for sample in samples])
    thinking = np.array([int((sample.trajectory.kinds == Kind.SOFT).sum()) for sample in samples])
    by_group: dict[int, bool] = {}
    for sample in samples:
        by_group[sample.group] = by_group.get(sample.group, True) and sample.advantage == 0
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/soft_tokens_mean": float(thinking.mean()),
        "response/cut_share": float(np.mean([s.trajectory.finish_reason == "length" for s in samples])),
        "learner/trajectories": float(len(samples)),
        "learner/refused_trajectories": float(len(refusals)),
        "learner/groups": float(len(by_group)),
        "learner/zero_advantage_groups": float(sum(by_group.values())),
        "learner/tokens": float(sum(sample.num_rows + 1 for sample in samples)),
    }
