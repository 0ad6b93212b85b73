"""What the controller asks a rollout actor to generate: plain data, no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal


def sample_seed(run_seed: int, prompt_id: str, visit: int, sample_index: int) -> int:
    """The int63 seed of one trajectory; a request that is dispatched again after a fault keeps it."""
    digest = hashlib.blake2b(f"{run_seed}\x1f{prompt_id}\x1f{visit}\x1f{sample_index}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1


@dataclass(frozen=True, slots=True)
class RequestSettings:
    """Settings of one request that differ from the engine's; None keeps the engine's."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    gumbel_temperature: float | None = None
    noise_scale: float | None = None
    thinking_budget: int | None = None
    max_new_tokens: int | None = None
    answer_temperature: float | None = None
    answer_top_p: float | None = None
    answer_top_k: int | None = None


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One response to generate."""

    request_id: str
    """`{group_id}/{sample_index}`: unique in a run, the key under which duplicates are dropped."""
    group_id: str
    """`{prompt_id}@{visit}`: the GRPO group."""
    prompt_id: str
    sample_index: int
    seed: int
    prompt_ids: tuple[int, ...]
    thinking: Literal["soft", "discrete"] = "soft"
    settings: RequestSettings | None = None
    """What differs from the engine (evaluation arms); None in training."""


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """What the controller needs to know of a finished group without fetching its trajectories."""

    group_id: str
    request_ids: tuple[str, ...]
    lengths: tuple[int, ...]
    """Response positions, per request."""
    soft_lengths: tuple[int, ...]
    """Soft positions, per request."""
    oldest_version: int
    """Of any token in the group: age is counted from here."""
    newest_version: int
    num_truncated: int
    """Responses that ended at the token limit."""
    entropy: float
    """Mean over soft positions of the categorical entropy over the retained candidates, nats; 0 without any."""
    top_weight: float
    """Mean over soft positions of the heaviest weight; 0 without any."""
    seconds: float
    """Wall time from the call to the last finished request."""
    num_cut: int = 0
    """Responses that were cut at a step boundary: the batch goes on in another call before anybody uses it."""
