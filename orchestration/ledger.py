"""Every visit of a prompt from its issue to its commit: who waits, who is finished, what a checkpoint holds.

    backlog or stream --issue--> outstanding --finish--> complete --publish--> uncommitted --commit--> in a checkpoint
          ^                           |                     |                      |
          +--- requeue, drop, put_back, roll_back ----------+----------------------+

The slots count and prove the staleness bound; here are the visits, batches and lengths behind their group ids.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence

from orchestration.dataset import PromptStream, Visit
from orchestration.run_state import RunState
from orchestration.slots import Phase, Slots
from orchestration.step_metrics import FinishedGroup
from rollout.request import GroupSummary

logger = logging.getLogger(__name__)

LEARNER_LOST = "learner lost"


class Ledger:
    """The visits of one run."""

    def __init__(self, slots: Slots, stream: PromptStream, backlog: Iterable[Visit] = ()) -> None:
        self.slots = slots
        self.complete: dict[str, FinishedGroup] = {}
        """Generated and graded, by group id, until they are trained."""
        self._stream = stream
        self._backlog: deque[Visit] = deque(backlog)
        """To issue before new ones."""
        self._visits: dict[str, Visit] = {}
        """Outstanding, by group id."""
        self._uncommitted: list[Visit] = []
        """Trained since the last checkpoint."""
        self._lengths: dict[str, tuple[int, ...]] = {}
        """Tokens of every response of the groups that have them and are in no checkpoint, by group id."""
        self.dropped: Counter[str] = Counter()
        """`dropped/<reason>_responses` and `dropped/<reason>_tokens` of dropped groups that had been generated."""

    def issue(self, actor_version: int) -> Visit:
        """The next visit, in a slot of its own, for an actor that serves `actor_version`."""
        visit = self._backlog.popleft() if self._backlog else next(self._stream)
        self.slots.dispatch(visit.group_id, actor_version)
        self._visits[visit.group_id] = visit
        return visit

    def generated(self, summary: GroupSummary) -> None:
        """All responses of a group are there, not yet graded."""
        self._lengths[summary.group_id] = summary.lengths

    def finish(self, group: FinishedGroup) -> None:
        """All responses of a group are graded."""
        self.complete[group.visit.group_id] = group
        self.slots.complete(group.visit.group_id, group.summary.oldest_version)

    def publish(self, version: int) -> None:
        """The batch in training became `version`."""
        for group_id in self.slots.publish(version):
            self._uncommitted.append(self._visits.pop(group_id))
            del self.complete[group_id]

    def commit(self) -> None:
        """A checkpoint holds what was trained so far."""
        for visit in self._uncommitted:
            del self._lengths[visit.group_id]
        self._uncommitted.clear()

    def requeue(self, group_id: str) -> None:
        """Its responses are lost: the same requests are issued again."""
        self.slots.requeue(group_id)
        self._issue_again(group_id)

    def drop(self, group_id: str, reason: str) -> None:
        """Give a group up for `reason`; its prompt is issued again."""
        self.slots.drop(group_id, reason)
        self._count_dropped(group_id, reason)
        self._issue_again(group_id)

    def fail(self, group_id: str, reason: str) -> None:
        """Give a group up for good."""
        self.slots.fail(group_id, reason)
        self.complete.pop(group_id, None)
        self._lengths.pop(group_id, None)
        del self._visits[group_id]

    def fail_batch(self, reason: str) -> None:
        """Give the batch in training up for good."""
        for group_id in self.slots.groups(Phase.TRAINING):
            self.fail(group_id, reason)

    def put_back(self, lost: Collection[str]) -> None:
        """The step was not begun: `lost` groups of its batch are issued again, the others are complete as before."""
        self.slots.put_back(lost)
        for group_id in lost:
            self._issue_again(group_id)

    def roll_back(self, version: int) -> Sequence[str]:
        """The learner is back at its last checkpoint, published as `version`; what that does not hold is issued again.

        Returns the groups that were given up; some are still being generated.
        """
        given_up = self.slots.roll_back(version, LEARNER_LOST)
        for group_id in [*given_up, *(visit.group_id for visit in self._uncommitted)]:
            self._count_dropped(group_id, LEARNER_LOST)
        for group_id in given_up:
            self._issue_again(group_id)
        self.slots.untrain(len(self._uncommitted), LEARNER_LOST)
        self._backlog.extend(self._uncommitted)
        self._uncommitted.clear()
        return given_up

    def queues(self) -> dict[str, int]:
        """Groups by what they wait for: their responses, their grades, a batch; and visits to issue again."""
        complete = len(self.complete)
        verifying = len(self._visits.keys() & self._lengths.keys()) - complete
        generating = len(self.slots) - verifying - complete
        return {"rollout": generating, "verifier": verifying, "learner": complete, "backlog": len(self._backlog)}

    def state(self, step: int) -> RunState:
        """The driver's part of a checkpoint: everything issued and not trained is pending."""
        pending = [*self._backlog, *self._visits.values()]
        return RunState(
            step=step,
            version=self.slots.version,
            stream=self._stream.state(),
            pending=tuple((visit.row.prompt_id, visit.visit) for visit in pending),
            counts={key: count for key, count in self.slots.counts.items() if key != "dispatched"},
        )

    def _count_dropped(self, group_id: str, reason: str) -> None:
        """What is dropped must not silently be the long ones; the pool counts what was still being generated."""
        if lengths := self._lengths.pop(group_id, None):
            logger.info("group %s is dropped (%s) with responses of %s tokens", group_id, reason, lengths)
            self.dropped[f"dropped/{reason}_responses"] += len(lengths)
            self.dropped[f"dropped/{reason}_tokens"] += sum(lengths)

    def _issue_again(self, group_id: str) -> None:
        self.complete.pop(group_id, None)
        self._lengths.pop(group_id, None)
        self._backlog.append(self._visits.pop(group_id))
