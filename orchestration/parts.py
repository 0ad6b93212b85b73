"""What a controller drives, as protocols: the real pools and the simulated ones of the tests fit them alike."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from learner.spec import PublishedWeights, ScoredGroup
from orchestration.config import Config
from orchestration.dataset import PromptStream, Visit
from orchestration.run_state import RunDirectory
from orchestration.step_metrics import StepMetrics
from rollout.request import GroupSummary, RolloutRequest, sample_seed

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

    @property
    def weights_lost(self) -> bool:
        """Whether a member cannot get the newest version because its bytes are gone or wrong: publish it again."""
        ...

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

    async def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        """Raises `RunError` only where the step was not begun."""
        ...

    async def publish(self, version: int) -> PublishedWeights:
        """The weights as they are, labelled `version`; under a number that they had before, sent afresh."""
        ...

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

    def requests(self, visit: Visit, config: Config) -> list[RolloutRequest]:
        """One group of responses; the same visit is always asked for with the same seeds."""
        prompt_ids = self.prompt_ids(visit)
        return [
            RolloutRequest(
                request_id=f"{visit.group_id}/{index}",
                group_id=visit.group_id,
                prompt_id=visit.row.prompt_id,
                sample_index=index,
                seed=sample_seed(config.seed, visit.row.prompt_id, visit.visit, index),
                prompt_ids=prompt_ids,
                thinking=config.sampling.thinking,
            )
            for index in range(config.algorithm.group_size)
        ]
