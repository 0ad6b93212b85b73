"""The algorithm: issue prompts, generate, verify, train, publish; asynchronous with bounded staleness.

    prompts --feed--> rollout --batch ref--> verifier --grades--> complete --next_batch--> learner --publish--+
       ^                 ^                                                                                     |
       |                 +----------------------- versioned weights -------------------------------------------+
       +---- backlog: groups whose actor died or whose batch is gone, groups dropped for age, groups trained by a
             learner that died before a checkpoint

| task    | waits for                                     | unblocked by                   | deadline            |
|---------|-----------------------------------------------|--------------------------------|---------------------|
| feed    | a slot, and a rollout actor with room         | publish, a finished group      | none: it only feeds |
| produce | its responses, then its grades                | rollout actor, verifier actor  | request_timeout_s   |
| run     | a batch that leaves no group behind too long  | produce                        | group_deadline_s    |
| train   | the learner                                   | learner ranks                  | step_timeout_s      |

Invariants: `Slots` proves the staleness bound; every visit of a prompt ends as trained, dropped or failed, and what was
trained counts only once a checkpoint holds it. The driver moves references and small numbers, never tensors.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from learner.spec import BatchesLost, CheckpointNotWritten, LearnerError, PublishedWeights, ReplayError, ScoredGroup
from orchestration.config import Config
from orchestration.dataset import PromptStream, Visit
from orchestration.failures import ActorLost, GroupFailed, InputLost, RunError
from orchestration.run_state import RunDirectory, RunState
from orchestration.slots import Phase, Slots
from orchestration.step_metrics import FinishedGroup, StepMetrics
from orchestration.watchdog import waiting_for
from rollout.full_store import PAUSE_S, StoreFull
from rollout.request import GroupSummary, RolloutRequest, sample_seed

if TYPE_CHECKING:
    from reward.verdict import Grade

logger = logging.getLogger(__name__)

PromptIds = Callable[[Visit], tuple[int, ...]]
MAX_SETBACKS_WITHOUT_PROGRESS = 3
"""Learner deaths, lost and ungraded batches in a row: with more, something breaks every step."""
MAX_UNWRITTEN_CHECKPOINTS = 3
"""In a row, while training goes on and somebody may make room on the disk."""


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


class Controller:
    """One run from its current state to `config.steps`, or to a stop request."""

    def __init__(
        self, config: Config, parts: Parts, state: RunState | None = None, backlog: Sequence[Visit] = ()
    ) -> None:
        self.config = config
        self.parts = parts
        self.step = state.step if state else 0
        self.slots = Slots(
            config.algorithm.prompts_per_step,
            config.pipeline.max_staleness,
            version=state.version if state else 0,
            outcomes=state.counts if state else None,
        )
        self.stopping = False
        self._changed = parts.rollout.changed
        self._backlog: deque[Visit] = deque(backlog)
        """Visits to issue before new ones."""
        self._visits: dict[str, Visit] = {}
        """Outstanding, by group id."""
        self._uncommitted: list[Visit] = []
        """Trained since the last checkpoint."""
        self._complete: dict[str, FinishedGroup] = {}
        self._verifying: set[str] = set()
        self._producers: dict[str, asyncio.Task[None]] = {}
        self._failure: BaseException | None = None
        self._setbacks = 0
        """Since the last finished step."""
        self._committed_step = self.step
        self._no_room_since: float | None = None
        """When a batch found no room in the object store, if no step was finished since."""
        self._unwritten_checkpoints = 0
        """Since the last one that was written."""
        self._metrics = StepMetrics()

    async def run(self) -> None:
        """Train until `config.steps` or a stop request; a checkpoint holds everything when it returns."""
        feeder = asyncio.create_task(self._feed(), name="feed")
        feeder.add_done_callback(self._background_ended)
        try:
            while self.step < self.config.steps:
                with _watched(f"groups for step {self.step + 1}", self.config.pipeline.group_deadline_s):
                    group_ids = await self._next_batch()
                if group_ids is None:
                    break
                if self._give_up_ungraded(group_ids):
                    continue
                try:
                    await self._train(group_ids)
                    if self.step % self.config.checkpoint.every_steps == 0 or self.step == self.config.steps:
                        await self.checkpoint()
                except ReplayError as error:
                    self._fail_batch(error)
                except BatchesLost as error:
                    self._put_batch_back(error)
                except LearnerError as error:
                    await self._recover_learner(error)
        finally:
            await _cancel(feeder, *self._producers.values())
        if self.step > self._committed_step:
            await self.checkpoint()

    def request_stop(self) -> None:
        """Finish the step in progress, checkpoint, return from `run`."""
        self.stopping = True
        self._changed.set()

    async def checkpoint(self) -> None:
        """Commit the learner's state with the driver's, atomically.

        A disk that does not take it costs this checkpoint and an alarm, unless it is the last one or too many in a row:
        then `RunError`.
        """
        started = _now()
        try:
            with self.parts.directory.new_checkpoint(self._state(), self.config.checkpoint.keep_last) as directory:
                await self.parts.learner.save(directory / "learner")
        except CheckpointNotWritten as error:
            self._unwritten_checkpoints += 1
            what = f"no checkpoint of step {self.step}, the last one is of step {self._committed_step}: {error}"
            needed = self.stopping or self.step == self.config.steps
            if needed or self._unwritten_checkpoints > MAX_UNWRITTEN_CHECKPOINTS:
                raise RunError(f"{what}; {self._unwritten_checkpoints} in a row: make room, then --resume") from error
            logger.error("%s; training goes on for now: make room", what)
            self._metrics.add("failures/unwritten_checkpoints", 1)
            return
        self._unwritten_checkpoints = 0
        self._committed_step = self.step
        self._uncommitted.clear()
        self._metrics.add("time/checkpoint_s", _now() - started)

    async def _feed(self) -> None:
        """Start groups as long as slots and rollout actors allow."""
        size = self.config.algorithm.group_size
        while True:
            while self._wants_more() and (room := self.parts.rollout.reserve(size, self.slots.can_dispatch)):
                visit = self._backlog.popleft() if self._backlog else next(self.parts.stream)
                self.slots.dispatch(visit.group_id, room.version)
                self._visits[visit.group_id] = visit
                producer = asyncio.create_task(self._produce(visit, room), name=visit.group_id)
                self._producers[visit.group_id] = producer
                producer.add_done_callback(self._background_ended)
                producer.add_done_callback(partial(_release, room))
            await self._wait_for_change()

    def _wants_more(self) -> bool:
        """No group is started that the remaining steps could not train."""
        remaining = (self.config.steps - self.step) * self.config.algorithm.prompts_per_step
        return not self.stopping and len(self.slots) < remaining

    async def _produce(self, visit: Visit, room: Room) -> None:
        """One group from prompt to complete: generate, verify; or back to the backlog, or failed."""
        group_id = visit.group_id
        try:
            batch, summary = await self.parts.rollout.generate(room, self._requests(visit))
            self._verifying.add(group_id)
            grades = await self.parts.verifier.score(batch, visit.row.gold, visit.row.rule)
        except (ActorLost, InputLost) as loss:
            logger.warning("group %s is generated again: %s", group_id, loss)
            self.slots.requeue(group_id)
            self._reissue(group_id)
        except StoreFull as full:
            await self._hold_back(full)
            self.slots.requeue(group_id)
            self._reissue(group_id)
        except GroupFailed as failure:
            logger.error("group %s failed: %s", group_id, failure)
            self.slots.fail(group_id, "generation or grading")
            del self._visits[group_id]
        else:
            self._complete[group_id] = FinishedGroup(batch, summary, grades, visit)
            self.slots.complete(group_id, summary.oldest_version)
        finally:
            self._verifying.discard(group_id)
        self._changed.set()

    async def _hold_back(self, full: StoreFull) -> None:
        """No room for a batch: its slot stays taken for a while, so that less is in flight until some was trained."""
        now = _now()
        if self._no_room_since is None:
            self._no_room_since = now
        if now - self._no_room_since > self.config.pipeline.sync_timeout_s:
            raise RunError(f"no step in {now - self._no_room_since:.0f} s for lack of room: {full}") from full
        logger.warning("%s (generated again)", full)
        self._metrics.add("failures/no_room", 1)
        await asyncio.sleep(PAUSE_S)

    def _requests(self, visit: Visit) -> list[RolloutRequest]:
        prompt_ids, sampling = self.parts.prompt_ids(visit), self.config.sampling
        return [
            RolloutRequest(
                request_id=f"{visit.group_id}/{index}",
                group_id=visit.group_id,
                prompt_id=visit.row.prompt_id,
                sample_index=index,
                seed=sample_seed(self.config.seed, visit.row.prompt_id, visit.visit, index),
                prompt_ids=prompt_ids,
                thinking=sampling.thinking,
            )
            for index in range(self.config.algorithm.group_size)
        ]

    async def _next_batch(self) -> list[str] | None:
        """The next groups to train, waiting for those that may not be left behind; None on a stop request."""
        started = blocked_since = _now()
        while not self.stopping:
            self._raise_if_broken()
            if group_ids := self.slots.next_batch():
                self._metrics.add("time/learner_wait_s", _now() - started)
                return group_ids
            blocking = self.slots.blocking()
            if not blocking:
                blocked_since = _now()
            elif _now() - blocked_since > self.config.pipeline.group_deadline_s:
                self._drop_for_age(blocking)
                continue
            await self._wait_for_change()
        return None

    def _drop_for_age(self, group_ids: Sequence[str]) -> None:
        deadline = self.config.pipeline.group_deadline_s
        for group_id in group_ids:
            logger.warning("group %s dropped: not finished %.0f s after it became due", group_id, deadline)
            self._producers.pop(group_id).cancel()
            self.slots.drop(group_id, "age")
            self._reissue(group_id)

    def _give_up_ungraded(self, group_ids: Sequence[str]) -> bool:
        """Whether too many graders failed for this batch to teach anything: then all complete groups with such answers
        are issued again and training waits. Raises `RunError` when that does not help.
        """
        grades = [grade for group_id in group_ids for grade in self._complete[group_id].grades]
        failed, number = [grade for grade in grades if grade.verdict.is_failure], len(grades)
        if len(failed) <= self.config.reward.failure_alarm * number:
            return False
        problem = (
            f"step {self.step + 1}: {len(failed)} of {number} answers could not be graded, more than "
            f"reward.failure_alarm={self.config.reward.failure_alarm:g}: {_verdicts(failed)}"
        )
        self._setbacks += 1
        if self._setbacks > MAX_SETBACKS_WITHOUT_PROGRESS:
            raise RunError(f"{problem}; {self._setbacks} setbacks in a row, grading again does not help")
        logger.error("%s; not trained, those groups are issued again", problem)
        ungraded = [name for name, group in self._complete.items() if any(g.verdict.is_failure for g in group.grades)]
        for group_id in ungraded:
            self.slots.drop(group_id, "ungraded")
            self._reissue(group_id)
        self._metrics.add("failures/ungraded_batches", 1)
        self._changed.set()
        return True

    async def _train(self, group_ids: list[str]) -> None:
        """One training step at the current version, and the publication of what it made."""
        started, version = _now(), self.slots.version
        finished = [self._complete[group_id] for group_id in group_ids]
        ages = [self.slots.age(group_id) for group_id in group_ids]
        self.slots.start_training(group_ids)
        groups = [group.scored(self.config.reward.on_failure) for group in finished]
        with _watched(f"step {self.step + 1} on the learner", self.config.learner.step_timeout_s):
            learned = await self.parts.learner.train(groups, self.step)
        self._metrics.update(learned)
        self._metrics.add("time/train_s", _now() - started)
        await self._publish(version + 1)
        self._setbacks = 0
        self._no_room_since = None
        metrics, self._metrics = self._metrics, StepMetrics()
        for group, age in zip(finished, ages, strict=True):
            metrics.observe(group, age)
        metrics.conclude(_now() - started, self.slots.counts, self._queues())
        await self.parts.after_step(self.step, self.slots.version, metrics)

    async def _publish(self, version: int) -> None:
        """Put the learner's weights into the object store and free the slots of the batch they came from."""
        started = _now()
        with _watched(f"version {version} from the learner", self.config.pipeline.sync_timeout_s):
            weights = await self.parts.learner.publish(version)
        for group_id in self.slots.publish(version):
            self._uncommitted.append(self._visits.pop(group_id))
            del self._complete[group_id]
        self.step += 1  # with its groups and its version: whatever fails from here on, a checkpoint fits the learner
        await self.parts.rollout.publish(weights)
        self._metrics.add("time/publish_s", _now() - started)
        self._changed.set()

    def _queues(self) -> dict[str, int]:
        """Groups by what they wait for: their responses, their grades, a batch; and visits to issue again."""
        verifying, complete = len(self._verifying), len(self._complete)
        generating = len(self.slots) - verifying - complete
        return {"rollout": generating, "verifier": verifying, "learner": complete, "backlog": len(self._backlog)}

    def _fail_batch(self, error: ReplayError) -> None:
        """Nothing of the batch could be replayed: its groups failed, the policy stays as it is."""
        logger.error("a batch failed: %s", error)
        for group_id in self.slots.groups(Phase.TRAINING):
            self.slots.fail(group_id, error.outcome)
            del self._complete[group_id], self._visits[group_id]
        self._changed.set()

    def _put_batch_back(self, error: BatchesLost) -> None:
        """A node went with batches on it: those groups are generated again, the rest of the batch waits for them."""
        self._setbacks += 1
        if self._setbacks > MAX_SETBACKS_WITHOUT_PROGRESS:
            raise RunError(f"step {self.step + 1}: {error}, {self._setbacks} times in a row") from error
        logger.warning("step %d: %s", self.step + 1, error)
        self.slots.put_back(error.group_ids)
        for group_id in error.group_ids:
            self._reissue(group_id)
        self._metrics.add("failures/lost_batches", len(error.group_ids))
        self._changed.set()

    async def _recover_learner(self, error: LearnerError) -> None:
        """Rebuild the learner from the last checkpoint as a new version; what it trained since is issued again."""
        version, weights = self.slots.version + 1, None
        while weights is None:
            self._setbacks += 1
            if self._setbacks > MAX_SETBACKS_WITHOUT_PROGRESS:
                raise error
            logger.error("learner lost at step %d: %s", self.step, error)
            checkpoint = self.parts.directory.checkpoint_of(self._committed_step)
            try:
                await self.parts.learner.start(checkpoint / "learner" if checkpoint else None)
                weights = await self.parts.learner.publish(version)
            except LearnerError as again:
                error = again
        for group_id in self.slots.roll_back(version, "learner lost"):
            if producer := self._producers.pop(group_id, None):
                producer.cancel()
            self._reissue(group_id)
        self.slots.untrain(len(self._uncommitted), "learner lost")
        self._backlog.extend(self._uncommitted)
        self._uncommitted.clear()
        self.step = self._committed_step
        await self.parts.rollout.publish(weights)
        self._changed.set()

    def _reissue(self, group_id: str) -> None:
        self._complete.pop(group_id, None)
        self._backlog.append(self._visits.pop(group_id))

    def _state(self) -> RunState:
        """The driver's part of a checkpoint: everything issued and not trained is pending."""
        pending = [*self._backlog, *self._visits.values()]
        return RunState(
            step=self.step,
            version=self.slots.version,
            stream=self.parts.stream.state(),
            pending=tuple((visit.row.prompt_id, visit.visit) for visit in pending),
            counts={key: count for key, count in self.slots.counts.items() if key != "dispatched"},
        )

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(1.0):
                await self._changed.wait()
        except TimeoutError:
            return  # wakes to look at deadlines

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        if self._producers.get(task.get_name()) is task:
            del self._producers[task.get_name()]
        if not task.cancelled() and task.exception() is not None and self._failure is None:
            self._failure = task.exception()
            self._changed.set()

    def _raise_if_broken(self) -> None:
        self.parts.rollout.raise_if_broken()
        self.parts.verifier.raise_if_broken()
        if self._failure is not None:
            raise self._failure


def _watched(what: str, deadline_s: float) -> AbstractContextManager[None]:
    """Half of a deadline gone is worth a report of the watchdog."""
    return waiting_for(what, who="controller", deadline_s=deadline_s / 2)


def _now() -> float:
    """The event loop's clock, in seconds: simulations replace it."""
    return asyncio.get_running_loop().time()


def _verdicts(failed: Sequence[Grade]) -> str:
    """Counts of failed verdicts, and what the last one was about."""
    counts = Counter(grade.verdict for grade in failed)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f" (the last: {failed[-1].detail})"


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _release(room: Room, _: asyncio.Task[None]) -> None:
    room.release()
