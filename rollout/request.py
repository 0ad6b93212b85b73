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
