"""Staleness slots: which groups may start, and which must be in the next batch (pure, no clock, no Ray).

Every group is dispatched at a version (that of the actor that starts it) and consumed by the training step at some
version v, which makes version v + 1. With B groups a batch, staleness bound S and w the version of the next step:

    slots      groups outstanding, those in training included, number at most (S + 1) B
    deadline   N(u), the waiting groups of version <= u, is at most (u + S + 1 - w) B for every u

A slot is freed when its group was trained *and* the new version was published.

Why no group can grow too old. `deadline` says that the groups of version <= u can all be consumed by the steps
w, w + 1, ..., u + S, which is each one's last permitted step. It is kept by every move:
* dispatch at version a adds one to N(u) for u >= a only, and is refused when that would break an inequality;
* completion can only raise a group's version (its oldest token is never older than its dispatch), which lowers N;
* a batch is taken only if what it leaves satisfies the inequalities for w + 1. The B oldest complete groups are the
  best choice for every u at once; if even they do not do, the learner waits for an older group still generating;
* its publication changes nothing: the version that was being made is now there, so w stays, and no group of it waits;
* a batch put back undoes its taking: w falls by one, which adds B to every bound, and no N(u) grows by more than B;
* a batch that fails in training lets w fall likewise, and adds nothing to any N;
* a roll back publishes a version without a batch, so w rises where none was being trained, and nothing was consumed for
  it: the oldest waiting groups are given up, each of which lowers N at least where any other would, until the
  inequalities hold for the new w;
* a drop, a failure or a requeue of a waiting group lowers N; its next dispatch is checked like any other.
At u = w - 1 - S the inequality reads N(u) <= 0: nothing waiting is older than S at the next step.

S = 0 allows B groups at the current version and nothing while a step runs: exact synchronous training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Where an outstanding group is."""

    GENERATING = "generating"
    COMPLETE = "complete"
    TRAINING = "training"


class SlotError(AssertionError):
    """A move that the invariants forbid: a bug in the caller, never bad luck."""


@dataclass(slots=True)
class Slot:
    """One outstanding group."""

    group_id: str
    order: int
    version: int
    """Lower bound of the version of its oldest token; exact once complete."""
    phase: Phase = Phase.GENERATING


class Slots:
    """The outstanding groups of a run.

    Invariants, asserted after every move: the two inequalities of the module, and
    dispatched = outstanding + trained + dropped + failed.
    """

    def __init__(
        self, batch: int, max_staleness: int, version: int = 0, outcomes: Mapping[str, int] | None = None
    ) -> None:
        self.batch = batch
        self.max_staleness = max_staleness
        self.version = version
        """The newest published policy version."""
        self.counts: Counter[str] = Counter()
        """dispatched, trained, requeued, `dropped/<reason>`, `failed/<reason>`"""
        self.counts.update(outcomes or {})
        self.counts["dispatched"] = self._ended()
        self._slots: dict[str, Slot] = {}
        self._next_order = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def capacity(self) -> int:
        """Slots in all."""
        return (self.max_staleness + 1) * self.batch

    @property
    def training(self) -> bool:
        """Whether a batch was taken whose version is not published yet."""
        return any(slot.phase is Phase.TRAINING for slot in self._slots.values())

    @property
    def next_step_version(self) -> int:
        """w: the version at which the next batch will be trained."""
        return self.version + self.training

    def groups(self, phase: Phase) -> list[str]:
        """Group ids in that phase, in the order of dispatch."""
        return [slot.group_id for slot in self._slots.values() if slot.phase is phase]

    def can_dispatch(self, actor_version: int) -> bool:
        """Whether a group may start now on an actor that serves `actor_version`."""
        if len(self._slots) >= self.capacity:
            return False
        return self._fits([*self._waiting(), actor_version], self.next_step_version)

    def dispatch(self, group_id: str, actor_version: int) -> None:
        """Take a slot for a group that starts on an actor of `actor_version`."""
        if group_id in self._slots:
            raise SlotError(f"group {group_id} is already outstanding")
        if not self.can_dispatch(actor_version):
            raise SlotError(f"no slot for group {group_id} at actor version {actor_version} (policy {self.version})")
        self._slots[group_id] = Slot(group_id, self._next_order, actor_version)
        self._next_order += 1
        self.counts["dispatched"] += 1
        self._check()

    def complete(self, group_id: str, oldest_version: int) -> None:
        """All samples of the group are verified; its oldest token was sampled under `oldest_version`."""
        slot = self._slot(group_id, Phase.GENERATING)
        if oldest_version < slot.version:
            raise SlotError(f"group {group_id} was dispatched at {slot.version}, but holds a token of {oldest_version}")
        slot.version, slot.phase = oldest_version, Phase.COMPLETE
        self._check()

    def next_batch(self) -> list[str] | None:
        """The B groups to train now, oldest version first (ties in the order of dispatch); None means wait."""
        if self.training:
            return None
        complete = sorted(self._of(Phase.COMPLETE), key=lambda slot: (slot.version, slot.order))
        chosen = complete[: self.batch]
        if len(chosen) < self.batch:
            return None
        left = [slot.version for slot in complete[self.batch :]]
        left += [slot.version for slot in self._of(Phase.GENERATING)]
        if not self._fits(left, self.version + 1):
            return None
        return [slot.group_id for slot in chosen]

    def blocking(self) -> str | None:
        """The oldest group still generating, where a batch without any of those would let one grow too old; else None.

        To give it up lowers N(u) wherever another one would; after all of them nothing blocks.
        """
        if self.training or len(self._of(Phase.COMPLETE)) < self.batch or self.next_batch() is not None:
            return None
        return min(self._of(Phase.GENERATING), key=lambda slot: (slot.version, slot.order)).group_id

    def start_training(self, group_ids: Sequence[str]) -> None:
        """The learner consumes these groups at the current version; ages are checked again here."""
        for group_id in group_ids:
            slot = self._slot(group_id, Phase.COMPLETE)
            age = self.version - slot.version
            if age > self.max_staleness:
                raise SlotError(f"group {group_id} is {age} versions old, the bound is {self.max_staleness}")
            slot.phase = Phase.TRAINING
        self._check()

    def publish(self, version: int) -> list[str]:
        """The trained batch's weights are published as `version`; frees and returns its groups."""
        if version <= self.version:
            raise SlotError(f"version {version} is not newer than {self.version}")
        trained = self.groups(Phase.TRAINING)
        for group_id in trained:
            del self._slots[group_id]
        self.counts["trained"] += len(trained)
        self.version = version
        self._check()
        return trained

    def put_back(self, lost: Collection[str]) -> None:
        """The step was not begun: `lost` groups of its batch are requeued, the others are complete as before."""
        for group_id in self.groups(Phase.TRAINING):
            if group_id in lost:
                self._requeue(group_id)
            else:
                self._slots[group_id].phase = Phase.COMPLETE
        self._check()

    def roll_back(self, version: int, reason: str) -> list[str]:
        """The learner lost its state; what it has now is published as `version`.

        Gives up (`counts["dropped/<reason>"]`) and returns the batch in training and, oldest first, waiting groups that
        could not be trained in time any more, because this version was published without consuming a batch.
        """
        given_up = self.groups(Phase.TRAINING)
        waiting = sorted((s for s in self._slots.values() if s.phase is not Phase.TRAINING), key=lambda s: s.version)
        while not self._fits([slot.version for slot in waiting], version):
            given_up.append(waiting.pop(0).group_id)
        for group_id in given_up:
            del self._slots[group_id]
        self.counts[f"dropped/{reason}"] += len(given_up)
        self.version = version
        self._check()
        return given_up

    def drop(self, group_id: str, reason: str) -> None:
        """Give the group up (`counts["dropped/<reason>"]`); its prompt may be issued again under a new group id."""
        self._remove(group_id, f"dropped/{reason}")

    def fail(self, group_id: str, reason: str) -> None:
        """The group can never be trained (`counts["failed/<reason>"]`)."""
        self._remove(group_id, f"failed/{reason}")

    def requeue(self, group_id: str) -> None:
        """Its actor died, or its batch is lost: the slot is free until the same requests are dispatched again."""
        self._requeue(self._slot(group_id, Phase.GENERATING).group_id)
        self._check()

    def untrain(self, number: int, reason: str) -> None:
        """So many trained groups were lost with the learner's state since its last checkpoint."""
        self.counts["trained"] -= number
        self.counts[f"dropped/{reason}"] += number
        self._check()

    def age(self, group_id: str) -> int:
        """Versions between the group's oldest token and the newest published policy."""
        return self.version - self._slots[group_id].version

    def _requeue(self, group_id: str) -> None:
        del self._slots[group_id]
        self.counts["dispatched"] -= 1
        self.counts["requeued"] += 1

    def _remove(self, group_id: str, outcome: str) -> None:
        if group_id not in self._slots:
            raise SlotError(f"group {group_id} is not outstanding")
        del self._slots[group_id]
        self.counts[outcome] += 1
        self._check()

    def _of(self, phase: Phase) -> list[Slot]:
        return [slot for slot in self._slots.values() if slot.phase is phase]

    def _waiting(self) -> list[int]:
        return [slot.version for slot in self._slots.values() if slot.phase is not Phase.TRAINING]

    def _fits(self, versions: Sequence[int], step_version: int) -> bool:
        """N(u) <= (u + S + 1 - w) B for every u; between two versions that occur N is constant and the bound grows."""
        return all(
            number <= (version + self.max_staleness + 1 - step_version) * self.batch
            for number, version in enumerate(sorted(versions), start=1)
        )

    def _ended(self) -> int:
        return sum(count for key, count in self.counts.items() if key.split("/")[0] in ("trained", "dropped", "failed"))

    def _slot(self, group_id: str, phase: Phase) -> Slot:
        slot = self._slots.get(group_id)
        if slot is None or slot.phase is not phase:
            raise SlotError(f"group {group_id} is {slot.phase if slot else 'not outstanding'}, expected {phase}")
        return slot

    def _check(self) -> None:
        if len(self._slots) > self.capacity:
            raise SlotError(f"{len(self._slots)} groups outstanding, {self.capacity} slots")
        if not self._fits(self._waiting(), self.next_step_version):
            raise SlotError(f"a waiting group cannot be trained within {self.max_staleness} versions")
        if self.counts["dispatched"] != self._ended() + len(self._slots):
            raise SlotError(f"conservation: {dict(self.counts)} with {len(self._slots)} outstanding")
