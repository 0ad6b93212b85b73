"""One GPU, two pools: the learner trains while the engines sleep, the engines serve while the learner waits.

    train --> engines finish, sleep --> optimiser steps --> publish --> engines wake with the new version

Only for synchronous steps, which leave one of the two idle anyway; `Config.alternates` says when.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from learner.spec import BatchesLost, PublishedWeights, Refused, ScoredGroup
from orchestration.parts import Learner


class Sleeper(Protocol):
    """The rollout pool, as this module needs it; a new version wakes it by itself."""

    async def sleep(self) -> None: ...
    async def wake(self) -> None: ...


class AlternatingLearner:
    """A learner that has the device to itself while it trains."""

    def __init__(self, learner: Learner, engines: Sleeper) -> None:
        self._learner = learner
        self._engines = engines

    async def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        """As the learner's; a step that is refused makes no version, so the engines go on with the old one.

        Raises `RunError` where the engines cannot give the device up, or take it back from a step that is refused.
        """
        await self._engines.sleep()
        try:
            return await self._learner.train(groups, step)
        except (Refused, BatchesLost):
            await self._engines.wake()
            raise

    async def publish(self, version: int) -> PublishedWeights:
        """As the learner's."""
        return await self._learner.publish(version)

    async def save(self, directory: Path) -> None:
        """As the learner's."""
        await self._learner.save(directory)

    async def start(self, checkpoint: Path | None) -> dict[str, Any]:
        """As the learner's."""
        return await self._learner.start(checkpoint)
