"""From the rows that a sampler step sends per request to a finished trajectory; numpy only.

Between steps a request holds 8 + 4 (3 + 4 K) bytes per soft token in arrays that double, no Python objects.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout.request import RolloutRequest
from rollout.trajectory import Kind, Trajectory

if TYPE_CHECKING:
    from rollout.soft_token import SoftTokenParams

KIND_BITS = 2
"""Low bits of the rank column that hold the kind; the others hold the policy version."""

_FIRST_CAPACITY = 64


class PayloadError(RuntimeError):
    """vLLM delivered tokens without their rows: the trajectory would be wrong."""


class Recording:
    """The growing response of one running request."""

    def __init__(self, request: RolloutRequest, params: SoftTokenParams, prefix: Trajectory | None) -> None:
        self.request = request
        self._params = params
        self._prefix = prefix
        self._length = 0
        candidates = params.max_candidates if request.thinking == "soft" else 0
        self._ids = np.zeros((_FIRST_CAPACITY, 1 + candidates), dtype=np.int32)
        self._values = np.zeros((_FIRST_CAPACITY, (2 + 3 * candidates) if candidates else 1), dtype=np.float32)
        self._ranks = np.zeros(_FIRST_CAPACITY, dtype=np.int64)

    @property
    def prefix_ids(self) -> list[int]:
        """Response tokens that were recorded before this engine took over."""
        return [] if self._prefix is None else self._prefix.response_ids.tolist()

    def append(self, tokens: list[int], rows: Any) -> None:
        """Take over the payload rows of newly sampled tokens (vLLM `LogprobsLists`)."""
        if not tokens:
            return
        if rows is None or len(rows.sampled_token_ranks) != len(tokens):
            raise PayloadError(f"request {self.request.request_id}: {len(tokens)} tokens came without payload rows")
        begin, end = self._length, self._length + len(tokens)
        if end > len(self._ranks):
            self._grow(end)
        ids, values = rows.logprob_token_ids, rows.logprobs
        if ids.shape[1] == self._ids.shape[1]:
            self._ids[begin:end], self._values[begin:end] = ids, values
        else:
            # A batch without thinking rows sends fewer columns; one with some sends more than discrete requests need.
            id_columns = min(ids.shape[1], self._ids.shape[1])
            value_columns = min(values.shape[1], self._values.shape[1])
            self._ids[begin:end, :id_columns] = ids[:, :id_columns]
            self._values[begin:end, :value_columns] = values[:, :value_columns]
        self._ranks[begin:end] = rows.sampled_token_ranks
        if self._ids[end - 1, 0] != tokens[-1]:
            raise PayloadError(f"request {self.request.request_id}: payload row and token differ at position {end - 1}")
        self._length = end

    def _grow(self, needed: int) -> None:
        capacity = max(needed, 2 * len(self._ranks))
        for name in ("_ids", "_values", "_ranks"):
            old = getattr(self, name)
            new = np.zeros((capacity, *old.shape[1:]), dtype=old.dtype)
            new[: self._length] = old[: self._length]
            setattr(self, name, new)

    def finish(self, reason: str) -> Trajectory:
        """The trajectory, without its texts."""
        ids, values = self._ids[: self._length], self._values[: self._length]
        ranks = self._ranks[: self._length]
        kinds = (ranks & ((1 << KIND_BITS) - 1)).astype(np.uint8)
        soft = kinds == Kind.SOFT
        log_density = values[:, 0].copy()
        log_density[kinds == Kind.FORCED] = 0.0
        k = self._params.max_candidates
        if soft.any():
            candidate_ids = ids[soft, 1:]
            threshold, logprobs, noise, weights = np.split(values[soft, 1:], [1, 1 + k, 1 + 2 * k], axis=1)
            log_density[soft] = drawn_log_density(noise, logprobs, self._params)
        else:
            candidate_ids = np.zeros((0, k), np.int32)
            threshold, logprobs, noise, weights = (np.zeros((0, n), np.float32) for n in (1, k, k, k))
        request = self.request
        recorded = Trajectory(
            request_id=request.request_id,
            group_id=request.group_id,
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            seed=request.seed,
            prompt_ids=np.asarray(request.prompt_ids, dtype=np.int32),
            response_ids=ids[:, 0].copy(),
            kinds=kinds,
            versions=ranks >> KIND_BITS,
            log_density=log_density,
            candidate_ids=np.ascontiguousarray(candidate_ids),
            candidate_logprobs=np.ascontiguousarray(logprobs),
            noise=np.ascontiguousarray(noise),
            weights=np.ascontiguousarray(weights),
            censor_threshold=np.ascontiguousarray(threshold[:, 0]),
            finish_reason=reason,
            response_text="",
            answer_text="",
        )
        return recorded if self._prefix is None else joined(self._prefix, recorded)


def joined(prefix: Trajectory, rest: Trajectory) -> Trajectory:
    """One trajectory from a recorded prefix and its continuation."""
    from dataclasses import replace

    per_position = (
        "response_ids",
        "kinds",
        "versions",
        "log_density",
        "candidate_ids",
        "candidate_logprobs",
        "noise",
        "weights",
        "censor_threshold",
    )
    arrays = {name: np.concatenate((getattr(prefix, name), getattr(rest, name))) for name in per_position}
    return replace(rest, **arrays)


def candidate_entropy(logprobs: np.ndarray) -> np.ndarray:
    """Entropy in nats of the retained candidates of every soft position; log-probs [S, K], -inf where filtered."""
    p = np.exp(logprobs)
    return -(p * np.where(p > 0, logprobs, 0.0)).sum(axis=1)


def drawn_log_density(noise: np.ndarray, logprobs: np.ndarray, params: SoftTokenParams) -> np.ndarray:
    """Log-density of the drawn noise [S, K] under its own family, summed over the retained candidates; [S] fp32."""
    retained = logprobs > -np.inf
    if params.log_epsilon > 0:
        retained &= logprobs > np.float32(math.log(params.log_epsilon))
    e, log_p = noise.astype(np.float64), np.where(retained, logprobs, 0.0).astype(np.float64)
    if params.noise == "gumbel":
        density = -e - np.exp(-e)
    elif params.noise == "none":
        density = np.zeros_like(e)
    elif params.noise == "gaussian":
        from rollout.soft_token import GAUSSIAN_SIGMA

        scale = params.noise_scale if isinstance(params.noise_scale, float | int) else 1.0
        sigma = GAUSSIAN_SIGMA * max(float(scale), float(np.finfo(np.float64).tiny))
        density = -0.5 * ((e - np.exp(log_p)) / sigma) ** 2 - math.log(sigma * math.sqrt(2.0 * math.pi))
    else:
        shape = np.exp(log_p)
        gamma = np.frompyfunc(math.lgamma, 1, 1)(shape).astype(np.float64)
        density = (shape - 1.0) * np.log(np.where(retained, e, 1.0)) - e - gamma
    return np.where(retained, density, 0.0).sum(axis=1).astype(np.float32)
