"""From scored groups to packed passes: check, advantage, mini-batches, shares of the ranks.

    ScoredGroup --read_groups--> Sample --plan_step--> mini-batches --rank_batches--> ReplayBatch per pass

Every rank reads all groups (zero-copy) and computes the same plan, so nothing but the gradient crosses ranks.
Invariants: a group is never split over mini-batches; advantages and aggregation weights are those of the whole step
and mini-batch before anything is cut; every rank runs the same number of passes (the ZeRO collectives need it).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from learner.advantage import group_advantage
from learner.aggregation import sequence_weights
from learner.packing import ReplayBatch, plan_packs
from learner.spec import LearnerSpec, ReplayError, ScoredGroup
from rollout.soft_token import perturbed_values
from rollout.trajectory import Kind, Trajectory, TrajectoryError
from rollout.trajectory_check import validate

logger = logging.getLogger(__name__)


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

    Raises `ReplayError` if rewards do not fit the rows or the estimator, or no trajectory is left.
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
            good, bad = validate(batch, vocabulary_size=vocab_size, max_candidates=spec.max_candidates)
        except TrajectoryError as error:
            refusals += [f"group {group.group_id} row {row}: {error}" for row in range(batch.num_rows)]
            continue
        refusals += [str(problem) for problem in bad]
        rows = {request_id: row for row, request_id in enumerate(batch.column("request_id").to_pylist())}
        for trajectory in good:
            row = rows[trajectory.request_id]
            problem = _unusable(trajectory, group.rewards[row], spec)
            if problem:
                refusals.append(f"trajectory {trajectory.request_id}: {problem}")
            elif group.keep[row]:
                samples.append(Sample(trajectory, index, group.rewards[row], 0.0, _scored(trajectory, spec)))
    return samples, refusals


def _unusable(trajectory: Trajectory, reward: float, spec: LearnerSpec) -> str | None:
    """What a sound trajectory lacks to be trained on, or None."""
    length = len(trajectory.response_ids)
    if not len(trajectory.prompt_ids):
        return "column prompt_ids: empty"
    if not 0 < length <= spec.max_new_tokens:
        return f"column response_ids: {length} tokens, 1 to {spec.max_new_tokens} expected"
    if not math.isfinite(reward):
        return f"reward {reward}"
    return None


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
    joined: dict[str, Any] = {
        name: torch.from_numpy(np.concatenate([piece[name] for piece in pieces])) for name in pieces[0]
    }
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
    """The [S, K] columns, with what was perturbed and which candidates were retained."""
    present = t.candidate_logprobs > -np.inf
    raw = spec.noise in ("gaussian", "dirichlet")
    perturbed = t.noise if raw else _rebuilt(t, spec.noise_scale)
    # In the faithful mode filtered candidates stay in the mixture at log(epsilon).
    floor = np.log(spec.log_epsilon) + 1e-3 if spec.log_epsilon > 0 else -np.inf
    return {
        "candidate_ids": t.candidate_ids.astype(np.int64),
        "candidate_logprobs": t.candidate_logprobs,
        "weights": t.weights,
        "perturbed": np.where(present, perturbed, np.float32(-np.inf)),
        "retained": t.candidate_logprobs > floor,
    }


def _rebuilt(t: Trajectory, noise_scale: float) -> np.ndarray:
    """[S, K] what the sampler compared with the threshold; columns are copied, torch warns of read-only memory."""
    return perturbed_values(torch.tensor(t.candidate_logprobs), torch.tensor(t.noise), noise_scale).numpy()


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
        "learner/oldest_version": float(min(sample.trajectory.versions.min() for sample in samples)),
    }
