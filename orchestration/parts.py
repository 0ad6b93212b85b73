"""What a controller drives, as protocols: the real pools and the simulated ones of the tests fit them alike."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from learner.spec import PublishedWeights, ScoredGroup
from orchestration.dataset import PromptStream, Visit
from orchestration.run_state import RunDirectory
from orchestration.step_metrics import StepMetrics
from rollout.request import GroupSummary, RolloutRequest

if TYPE_CHECKING:
    from reward.verdict import Grade

PromptIds = Callable[[Visit], tuple[int, ...]]


class Room(Protocol):
    """Room for one group on a rollout actor that serves `version`."""

    version: int

    def release(self) -> None: ...


class Rollout(Protocol):
    """The rollout pool, as the controller needs it."""

    changed: asyncio.Event

    def reserve(self, size: int, accepts_version: Callable[[int], bool]) -> Room | None: ...
    async def generate(self, room: Any, requests: Sequence[RolloutRequest]) -> tuple[Any, GroupSummary]: ...
    async def publish(self, weights: PublishedWeights) -> None: ...
    def raise_if_broken(self) -> None: ...


class Verifier(Protocol):
    """The verifier pool."""

    async def score(self, batch: Any, gold: str | dict[str, Any], rule: str) -> list[Grade]: ...
    def raise_if_broken(self) -> None: ...


class Learner(Protocol):
    """The learner group."""

    async def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]: ...
    async def publish(self, version: int) -> PublishedWeights: ...
    async def save(self, directory: Path) -> None: ...
    async def start(self, checkpoint: Path | None) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a controller drives."""

    stream: PromptStream
    prompt_ids: PromptIds
    rollout: Rollout
    verifier: Verifier
    learner: Learner
    directory: RunDirectory
    after_step: Callable[[int, int, StepMetrics], Awaitable[None]]
    """(step, version, metrics): tracking, progress, evaluation; may wait (evaluation), must not fail."""
