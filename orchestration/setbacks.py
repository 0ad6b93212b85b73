"""What a run does where a step or a checkpoint cannot be made: give up as little as possible, and not for ever.

| setback                                        | given up                             | ends the run            |
|------------------------------------------------|--------------------------------------|-------------------------|
| too many graders of a batch failed             | complete groups with such answers    | 4 setbacks in a row     |
| batches of a step went with their node         | those groups                         | 4 setbacks in a row     |
| the learner died                               | steps since its last checkpoint      | 4 deaths on the same way |
| no room in the object store                    | batches that found none              | `sync_timeout_s` of it  |
| no room on the disk                            | a checkpoint                         | the 4th, or the last    |
| nothing in flight, and nothing may start       | nothing                              | `group_deadline_s`      |
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from learner.spec import BatchesLost, CheckpointNotWritten
from orchestration.config import Config
from orchestration.failures import RunError
from orchestration.ledger import Ledger
from orchestration.parts import Rollout
from orchestration.step_metrics import StepMetrics
from rollout.full_store import PAUSE_S, StoreFull

if TYPE_CHECKING:
    from reward.verdict import Grade

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 3
"""Lost and ungraded batches without a finished step, learner deaths without a new one: more will not help."""
MAX_UNWRITTEN_CHECKPOINTS = 3
"""In a row, while training goes on and somebody may make room on the disk."""


class Setbacks:
    """Those since the last finished step and the last written checkpoint."""

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger
        self._in_a_row = 0
        self._learner_deaths = 0
        """Since the run was last further than ever before, or wrote a checkpoint."""
        self._furthest_step = 0
        self._no_room_since: float | None = None
        """When a batch found no room in the object store, if none found any since."""
        self._unwritten_checkpoints = 0

    def step_finished(self, step: int) -> None:
        """All is well again, but for a learner that dies on the same way again and again: it has been here before."""
        self._in_a_row = 0
        if step > self._furthest_step:
            self._furthest_step, self._learner_deaths = step, 0

    def room_found(self) -> None:
        """The object store took a batch."""
        self._no_room_since = None

    def checkpoint_written(self) -> None:
        """The disk is well again, and no death of the learner leads back behind this point."""
        self._unwritten_checkpoints = self._learner_deaths = 0

    def learner_died(self) -> bool:
        """Count a death of the learner; whether the run ought to end with it."""
        self._learner_deaths += 1
        return self._learner_deaths > MAX_IN_A_ROW

    def _too_many(self) -> bool:
        self._in_a_row += 1
        return self._in_a_row > MAX_IN_A_ROW

    def ungraded(self, group_ids: Sequence[str], step: int, metrics: StepMetrics) -> bool:
        """Whether too many graders failed for the batch of `step` to teach anything: then all complete groups with such
        answers are issued again and training waits. Raises `RunError` when that does not help.
        """
        complete, alarm = self._ledger.complete, self._config.reward.failure_alarm
        grades = [grade for group_id in group_ids for grade in complete[group_id].grades]
        failed = [grade for grade in grades if grade.verdict.is_failure]
        if len(failed) <= alarm * len(grades):
            return False
        problem = (
            f"step {step}: {len(failed)} of {len(grades)} answers could not be graded, more than "
            f"reward.failure_alarm={alarm:g}: {_verdicts(failed)}"
        )
        if self._too_many():
            raise RunError(f"{problem}; {self._in_a_row} setbacks in a row, grading again does not help")
        logger.error("%s; not trained, those groups are issued again", problem)
        for group_id in [name for name, group in complete.items() if any(g.verdict.is_failure for g in group.grades)]:
            self._ledger.drop(group_id, "ungraded")
        metrics.add("failures/ungraded_batches", 1)
        return True

    def batches_lost(self, error: BatchesLost, step: int, metrics: StepMetrics) -> None:
        """A node went with batches on it: those groups are generated again, the rest of the batch waits for them."""
        self._ledger.put_back(error.group_ids)  # first: also where the run ends here, its learner can be saved
        if self._too_many():
            raise RunError(f"step {step}: {error}, {self._in_a_row} times in a row") from error
        logger.warning("step %d: %s", step, error)
        metrics.add("failures/lost_batches", len(error.group_ids))

    async def no_room(self, full: StoreFull, metrics: StepMetrics) -> None:
        """No room for a batch: its slot stays taken for a while, so that less is in flight until some was trained."""
        now = asyncio.get_running_loop().time()
        if self._no_room_since is None:
            self._no_room_since = now
        if now - self._no_room_since > self._config.pipeline.sync_timeout_s:
            raise RunError(f"no batch found room in {now - self._no_room_since:.0f} s: {full}") from full
        logger.warning("%s (generated again)", full)
        metrics.add("failures/no_room", 1)
        await asyncio.sleep(PAUSE_S)

    def checkpoint_not_written(self, what: str, error: CheckpointNotWritten, *, needed: bool) -> None:
        """The disk did not take a checkpoint: an alarm, or `RunError` if it was needed or is one too many."""
        self._unwritten_checkpoints += 1
        if needed or self._unwritten_checkpoints > MAX_UNWRITTEN_CHECKPOINTS:
            raise RunError(f"{what}; {self._unwritten_checkpoints} in a row: mend that, then --resume") from error
        logger.error("%s; training goes on for now: mend that", what)


def nothing_moves(ledger: Ledger, rollout: Rollout, group_size: int, waited_s: float) -> RunError:
    """Why a run ends in which no group is in flight, none may start and none of the complete ones may be trained."""
    offered: set[int] = set()

    def refuse(version: int) -> bool:
        offered.add(version)
        return False

    rollout.reserve(group_size, refuse)
    slots = ledger.slots
    offers = f"rollout actors with room serve versions {sorted(offered)}" if offered else "no rollout actor has room"
    return RunError(
        f"no group was started or finished for {waited_s:.0f} s: the policy is at version {slots.version}, {offers}, "
        f"{len(slots)} of {slots.capacity} slots are taken; the log says what became of the actors, then --resume"
    )


def _verdicts(failed: Sequence[Grade]) -> str:
    """Counts of failed verdicts, and what the last one was about."""
    counts = Counter(grade.verdict for grade in failed)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f" (the last: {failed[-1].detail})"
