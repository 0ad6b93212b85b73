"""Trajectories: the versioned Arrow batch that rollout actors return and learners replay.

One row is one response. Per soft position: K candidate ids, behaviour log-probs, noise and weights, never bf16
(weights shift by up to .13). Position kinds and policy versions are run lengths, never inferred from a token id.

    engine -> Trajectory (numpy) --pack--> pa.RecordBatch --object store--> unpack -> Trajectory (read-only views)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1
DEFAULT_MAX_CANDIDATES = 5


class Kind(IntEnum):
    """What one response position is."""

    DISCRETE = 0
    """An ordinary token, sampled with the answer settings."""
    SOFT = 1
    """A mixture; the emitted token is its heaviest candidate."""
    ENDED = 2
    """The end-of-thinking token, drawn from the thinking distribution; fed as an ordinary token."""
    FORCED = 3
    """The end-of-thinking token put there by the budget: no action of the policy, never in the loss."""


class TrajectoryError(ValueError):
    """A batch or a row that cannot be replayed; the message names the trajectory and the column."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One response of T positions, S of them soft, with K candidates each."""

    request_id: str
    group_id: str
    prompt_id: str
    sample_index: int
    seed: int
    prompt_ids: np.ndarray
    """[P] int32"""
    response_ids: np.ndarray
    """[T] int32 emitted tokens"""
    kinds: np.ndarray
    """[T] uint8, values of `Kind`"""
    versions: np.ndarray
    """[T] int64, the policy version each position was sampled under"""
    log_density: np.ndarray
    """[T] fp32 behaviour log-density: the likelihood's value at soft positions (0 if not computed), the full-vocabulary
    log-probability of the emitted token at its own temperature elsewhere; 0 at forced positions"""
    candidate_ids: np.ndarray
    """[S, K] int32"""
    candidate_logprobs: np.ndarray
    """[S, K] fp32, -inf where filtered out"""
    noise: np.ndarray
    """[S, K] fp32"""
    weights: np.ndarray
    """[S, K] fp32, 0 where filtered out or censored"""
    censor_threshold: np.ndarray
    """[S] fp32, NaN where the mixture was not censored"""
    finish_reason: str
    """stop | length"""
    response_text: str
    """The response without special tokens, for verifiers and reports."""
    answer_text: str
    """The part of `response_text` after the end of thinking; empty if thinking never ended."""


def schema_for(max_candidates: int) -> pa.Schema:
    """The trajectory schema for K = `max_candidates`; its version is in the metadata."""
    per_soft = pa.list_(pa.list_(pa.float32(), max_candidates))
    fields = [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field(
            "kind_runs",
            pa.list_(pa.struct([("kind", pa.uint8()), ("length", pa.int32())])),
            nullable=False,
        ),
        pa.field(
            "version_runs",
            pa.list_(pa.struct([("version", pa.int64()), ("length", pa.int32())])),
            nullable=False,
        ),
        pa.field("log_density", pa.list_(pa.float32()), nullable=False),
        pa.field("candidate_ids", pa.list_(pa.list_(pa.int32(), max_candidates)), nullable=False),
        pa.field("candidate_logprobs", per_soft, nullable=False),
        pa.field("noise", per_soft, nullable=False),
        pa.field("weights", per_soft, nullable=False),
        pa.field("censor_threshold", pa.list_(pa.float32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),
        pa.field("answer_text", pa.string(), nullable=False),
    ]
    metadata = {
        "softgrpo.schema_version": str(SCHEMA_VERSION),
        "softgrpo.max_candidates": str(max_candidates),
    }
    return pa.schema(fields, metadata=metadata)


SCHEMA = schema_for(DEFAULT_MAX_CANDIDATES)


def pack(trajectories: Sequence[Trajectory], max_candidates: int = DEFAULT_MAX_CANDIDATES) -> pa.RecordBatch:
    """Put trajectories into one record batch (one copy of every array).

    Raises `TrajectoryError` if an array's length or K does not fit its row.
    """
    raise NotImplementedError


def unpack(batch: pa.RecordBatch | pa.Table) -> list[Trajectory]:
    """The trajectories of a batch as read-only numpy views of its buffers (run lengths are expanded).

    Raises `TrajectoryError` if the schema or its version is not ours.
    """
    raise NotImplementedError
