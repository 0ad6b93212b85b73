"""The algorithm: issue prompts, generate, verify, train, publish; asynchronous with bounded staleness.

    prompts --feed--> rollout --batch ref--> verifier --grades--> complete --next_batch--> learner --publish--+
       ^                 ^                                                                                     |
       |                 +----------------------- versioned weights -------------------------------------------+
       +---- backlog: groups whose actor died or whose batch is gone, groups dropped for age, groups trained by a
             learner that died before a checkpoint

| task    | waits for                                     | unblocked by                   | deadline            |
|---------|-----------------------------------------------|--------------------------------|---------------------|
| feed    | a slot, and a rollout actor with room         | publish, a finished group      | that of run         |
| produce | its responses, then its grades                | rollout actor, verifier actor  | of each call: pools |
| run     | a batch that leaves no group behind too long  | produce; feed if none produces | group_deadline_s    |
| train   | the learner, then its version                 | learner ranks                  | of each call: group |

Invariants: `Slots` proves the staleness bound; every visit of a prompt ends as trained, dropped or failed, and what was
trained counts only once a checkpoint holds it. The driver moves references and small numbers, never tensors.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress

from learner.spec import BatchesLost, CheckpointNotWritten, LearnerError, PublishedWeights, ReplayError
from orchestration.config import Config
from orchestration.dataset import Visit
from orchestration.failures import ActorLost, GroupFailed, InputLost, RunError
from orchestration.ledger import LEARNER_LOST, Ledger
from orchestration.off_loop import in_thread, left_in_thread
from orchestration.parts import Parts, Room
from orchestration.run_state import RunState
from orchestration.setbacks import Setbacks, nothing_moves
from orchestration.slots import Slots
from orchestration.step_metrics import FinishedGroup, StepMetrics
from orchestration.watchdog import waiting_for
from rollout.full_store import StoreFull

logger = logging.getLogger(__name__)


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
        self._size = config.algorithm.group_size
        self._changed = parts.rollout.changed
        self._ledger = Ledger(self.slots, parts.stream, backlog)
        self._setbacks = Setbacks(config, self._ledger)
        self._producers: dict[str, asyncio.Task[None]] = {}
        """By group id."""
        self._ending: dict[str, asyncio.Task[None]] = {}
        """Producers that were given up and still have to tell their actor, by group id."""
        self._moved_at = 0.0
        """When a group was last started or left its producer, on the event loop's clock."""
        self._concluded_at = 0.0
        """When the step before was finished; at first, when the run began."""
        self._failure: BaseException | None = None
        """What a background task died of."""
        self._committed_step = self.step
        self._metrics = StepMetrics()

    async def run(self) -> None:
        """Train until `config.steps` or a stop request; a checkpoint holds everything when it returns."""
        self._concluded_at = _now()
        feeder = asyncio.create_task(self._feed(), name="feed")
        feeder.add_done_callback(self._background_ended)
        try:
            while self.step < self.config.steps:
                try:
                    with _watched(f"groups for step {self.step + 1}", self.config.pipeline.group_deadline_s):
                        group_ids = await self._next_batch()
                    if group_ids is None:
                        break
                    if self._setbacks.ungraded(group_ids, self.step + 1, self._metrics):
                        self._changed.set()
                        continue
                    await self._train(group_ids)
                    if self.step % self.config.checkpoint.every_steps == 0 or self.step == self.config.steps:
                        await self.checkpoint()
                except ReplayError as error:  # the policy stays as it is
                    logger.error("a batch failed: %s", error)
                    self._ledger.fail_batch(error.outcome)
                    self._changed.set()
                except BatchesLost as error:
                    self._setbacks.batches_lost(error, self.step + 1, self._metrics)
                    self._changed.set()
                except LearnerError as error:
                    await self._recover_learner(error)
        finally:
            await _cancel_all(feeder, *self._producers.values())
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
        started, state = _now(), self._ledger.state(self.step)
        try:
            writing = self.parts.directory.new_checkpoint(state, self.config.checkpoint.keep_last)
            async with left_in_thread(writing) as directory:
                await self.parts.learner.save(directory / "learner")
        except CheckpointNotWritten as error:
            what = f"no checkpoint of step {self.step}, the last one is of step {self._committed_step}: {error}"
            needed = self.stopping or self.step == self.config.steps
            self._setbacks.checkpoint_not_written(what, error, needed=needed)
            self._metrics.add("failures/unwritten_checkpoints", 1)
            return
        self._setbacks.checkpoint_written()
        self._committed_step = self.step
        self._ledger.commit()
        self._metrics.add("time/checkpoint_s", _now() - started)

    async def _feed(self) -> None:
        """Start groups as long as slots and rollout actors allow."""
        while True:
            while self._wants_more() and (room := self.parts.rollout.reserve(self._size, self.slots.can_dispatch)):
                visit = self._ledger.issue(room.version)
                producer = asyncio.create_task(self._produce(visit, room), name=visit.group_id)
                self._producers[visit.group_id] = producer
                self._moved_at = _now()
                producer.add_done_callback(self._background_ended)
                producer.add_done_callback(lambda _, room=room: room.release())  # type: ignore[misc]
                await asyncio.sleep(0)  # hundreds of groups may start at once: others have their turn in between
            await self._wait_for_change()

    def _wants_more(self) -> bool:
        """No group is started that the remaining steps could not train."""
        remaining = (self.config.steps - self.step) * self.config.algorithm.prompts_per_step
        return not self.stopping and len(self.slots) < remaining

    async def _produce(self, visit: Visit, room: Room) -> None:
        """One group from prompt to complete: generate, verify; or back to the backlog, or failed."""
        group_id = visit.group_id
        if before := self._ending.pop(group_id, None):
            await asyncio.wait([before])  # its requests have the same ids: an engine must have dropped them first
        try:
            batch, summary = await self.parts.rollout.generate(room, self.parts.requests(visit, self.config))
            self._setbacks.room_found()
            self._ledger.generated(summary)
            grades = await self.parts.verifier.score(batch, visit.row.gold, visit.row.rule)
        except (ActorLost, InputLost) as loss:
            logger.warning("group %s is generated again: %s", group_id, loss)
            self._ledger.requeue(group_id)
        except StoreFull as full:
            await self._setbacks.no_room(full, self._metrics)
            self._ledger.requeue(group_id)
        except GroupFailed as failure:
            logger.error("group %s failed: %s", group_id, failure)
            self._ledger.fail(group_id, "generation or grading")
        else:
            self._ledger.finish(FinishedGroup(batch, summary, grades, visit))
        self._changed.set()

    async def _next_batch(self) -> list[str] | None:
        """The next groups to train, waiting for those that may not be left behind; None on a stop request."""
        started = blocked_since = _now()
        while not self.stopping:
            self._raise_if_broken()
            if group_ids := self.slots.next_batch():
                self._metrics.add("time/learner_wait_s", _now() - started)
                return group_ids
            if self.parts.rollout.weights_lost:
                await self.publish_again()
            now, oldest, deadline = _now(), self.slots.blocking(), self.config.pipeline.group_deadline_s
            if oldest is None:
                blocked_since = now
            elif now - blocked_since > deadline:
                self._drop_for_age(oldest, now - blocked_since)
                continue
            still_since = max(started, self._moved_at)
            if not self._producers and now - still_since > deadline:
                raise nothing_moves(self._ledger, self.parts.rollout, self._size, now - still_since)
            await self._wait_for_change()
        return None

    def _drop_for_age(self, group_id: str, waited_s: float) -> None:
        logger.warning("group %s dropped: training waited %.0f s, and it is the oldest in flight", group_id, waited_s)
        self._give_up(group_id, "age")
        self._ledger.drop(group_id, "age")
        self._changed.set()

    def _give_up(self, group_id: str, reason: str) -> None:
        """End the producer of a group, if it has one; that of its next visit waits for it."""
        if producer := self._producers.pop(group_id, None):
            producer.cancel(reason)
            self._ending[group_id] = producer

    async def _train(self, group_ids: list[str]) -> None:
        """One training step at the current version, and the publication of what it made."""
        started, version = _now(), self.slots.version
        finished = [self._ledger.complete[group_id] for group_id in group_ids]
        ages = [self.slots.age(group_id) for group_id in group_ids]
        self.slots.start_training(group_ids)
        groups = [group.scored(self.config.reward.on_failure) for group in finished]
        try:
            with _watched(f"step {self.step + 1} on the learner", self.config.learner.step_timeout_s):
                learned = await self.parts.learner.train(groups, self.step)
        except RunError:  # not begun: the learner is of the step before and can be saved
            self._ledger.put_back(())
            raise
        self._metrics.update(learned)
        self._metrics.add("time/train_s", _now() - started)
        await self._publish(version + 1)
        self._setbacks.step_finished(self.step)
        metrics, self._metrics = self._metrics, StepMetrics()
        for group, age in zip(finished, ages, strict=True):
            metrics.observe(group, age)
        step_s, self._concluded_at = _now() - self._concluded_at, _now()
        metrics.conclude(step_s, self.slots.counts, self._ledger.queues(), self._ledger.dropped)
        await self.parts.after_step(self.step, self.slots.version, metrics)

    async def _publish(self, version: int) -> None:
        """Put the learner's weights into the object store and free the slots of the batch they came from."""
        started = _now()
        weights = await self._weights_of(version)
        self._ledger.publish(version)
        self.step += 1  # with its groups and its version: whatever fails from here on, a checkpoint fits the learner
        await self.parts.rollout.publish(weights)
        self._metrics.add("time/publish_s", _now() - started)
        self._changed.set()

    async def publish_again(self) -> None:
        """A rollout actor cannot get the newest version; the learner, which waits, still has its weights."""
        logger.warning("version %d is published again: a rollout actor cannot get it", self.slots.version)
        await self.parts.rollout.publish(await self._weights_of(self.slots.version))
        self._metrics.add("failures/republished", 1)

    async def _weights_of(self, version: int) -> PublishedWeights:
        with _watched(f"version {version} from the learner", self.config.pipeline.sync_timeout_s):
            return await self.parts.learner.publish(version)

    async def _recover_learner(self, error: LearnerError) -> None:
        """Rebuild the learner from the last checkpoint as a new version; what it trained since is issued again."""
        version, weights = self.slots.version + 1, None
        while weights is None:
            if self._setbacks.learner_died():
                raise error
            logger.error("learner lost at step %d: %s", self.step, error)
            checkpoint = await in_thread(self.parts.directory.checkpoint_of, self._committed_step)
            try:
                await self.parts.learner.start(checkpoint / "learner" if checkpoint else None)
                weights = await self.parts.learner.publish(version)
            except LearnerError as again:
                error = again
        for group_id in self._ledger.roll_back(version):
            self._give_up(group_id, LEARNER_LOST)
        self.step = self._committed_step
        try:
            await self.parts.rollout.publish(weights)
        except LearnerError as again:  # it sends them itself, by NCCL
            await self._recover_learner(again)
        self._changed.set()

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        with suppress(TimeoutError):  # wakes to look at deadlines
            async with asyncio.timeout(1.0):
                await self._changed.wait()

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        self._moved_at = _now()
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


async def _cancel_all(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel("end")
    await asyncio.gather(*tasks, return_exceptions=True)
