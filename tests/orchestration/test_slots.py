"""The staleness state machine: conservation, order and the bound, for any interleaving."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.slots import Phase, SlotError, Slots


def fill(slots: Slots, prefix: str = "g") -> list[str]:
    """Dispatch at the current version until refused."""
    started = []
    while slots.can_dispatch(slots.version):
        name = f"{prefix}{slots.version}-{len(started)}"
        slots.dispatch(name, slots.version)
        started.append(name)
    return started


def test_bound_zero_is_synchronous() -> None:
    slots = Slots(batch=2, max_staleness=0)
    first = fill(slots)
    assert len(first) == 2
    for group in reversed(first):
        slots.complete(group, 0)
    assert slots.next_batch() == first, "ties are trained in the order of dispatch, not of completion"
    slots.start_training(first)
    assert not slots.can_dispatch(0), "nothing may start while a step runs"
    slots.publish(1)
    assert not slots.can_dispatch(0), "an actor that still serves version 0 may not start a group"
    assert slots.can_dispatch(1)


def test_learner_waits_for_a_group_that_would_grow_too_old() -> None:
    slots = Slots(batch=1, max_staleness=2)
    a, b, c = fill(slots)
    slots.complete(a, 0)
    slots.start_training([a])
    slots.publish(1)
    (d,) = fill(slots)
    slots.complete(d, 1)
    assert slots.next_batch() is None, "b and c both need a step before version 3: one of them must go now"
    assert slots.blocking() == b
    slots.complete(c, 0)
    assert slots.next_batch() == [c]


def test_drop_unblocks_the_learner_and_is_counted() -> None:
    slots = Slots(batch=1, max_staleness=1)
    a, b = fill(slots)
    slots.complete(a, 0)
    slots.start_training([a])
    slots.publish(1)
    (c,) = fill(slots)
    slots.complete(c, 1)
    assert slots.next_batch() is None and slots.blocking() == b
    slots.drop(b, "age")
    assert slots.next_batch() == [c] and slots.blocking() is None
    assert slots.counts["dropped/age"] == 1


def test_only_the_oldest_group_blocks_where_that_is_enough() -> None:
    """A younger one that is still generated has steps left, though it was dispatched before."""
    slots = Slots(batch=1, max_staleness=4)
    for version in range(4):
        if version == 3:
            slots.dispatch("young", 3)
            slots.dispatch("long", 0)  # by an actor that lags behind
        slots.dispatch(f"g{version}", version)
        slots.complete(f"g{version}", version)
        slots.start_training([f"g{version}"])
        slots.publish(version + 1)
    slots.dispatch("done", 4)
    slots.complete("done", 4)
    assert slots.next_batch() is None and slots.blocking() == "long"
    slots.drop("long", "age")
    assert slots.next_batch() == ["done"]


def test_the_oldest_version_is_trained_first_and_known_once_a_group_is_complete() -> None:
    slots = Slots(batch=1, max_staleness=2)
    a, b, c = fill(slots)
    slots.complete(a, 0)
    slots.start_training([a])
    slots.publish(1)
    slots.complete(b, 1)  # its actor had the new version before it began
    slots.complete(c, 0)
    assert (slots.age(b), slots.age(c)) == (0, 1)
    assert slots.next_batch() == [c], "dispatched after b, but of an older version"


@pytest.mark.parametrize(
    ("breach", "problem"),
    [
        (lambda slots: slots.counts.update(trained=1), "conservation"),
        (lambda slots: slots.counts.update(dispatched=1), "conservation"),
        (lambda slots: setattr(slots, "version", 2), "cannot be trained within 1 versions"),
        (lambda slots: setattr(slots, "batch", 1), "4 groups outstanding, 2 slots"),
    ],
)
def test_a_broken_invariant_is_noticed_by_the_next_move(breach: Callable[[Slots], None], problem: str) -> None:
    slots = Slots(batch=2, max_staleness=1)
    *_, last = fill(slots)
    breach(slots)
    with pytest.raises(SlotError, match=problem):
        slots.complete(last, slots.version)


def test_a_learner_that_lost_its_state_costs_what_could_not_be_trained_in_time() -> None:
    """A version that consumed no batch leaves the waiting groups one step less: the oldest of too many go."""
    slots = Slots(batch=1, max_staleness=1)
    a, b = fill(slots)
    assert slots.roll_back(1, "lost") == [a]
    slots.complete(b, 0)
    assert slots.next_batch() == [b]
    slots.start_training([b])
    (c,) = fill(slots)
    assert slots.roll_back(2, "lost") == [b], "w has risen already: only the batch in training is lost"
    slots.complete(c, 1)
    slots.start_training([c])
    slots.publish(3)
    slots.untrain(1, "lost")
    assert slots.counts == {"dispatched": 3, "dropped/lost": 3, "trained": 0}


def test_lagging_actor_gets_no_work_that_could_not_be_trained_in_time() -> None:
    slots = Slots(batch=1, max_staleness=1, version=5)
    assert slots.can_dispatch(4)
    assert not slots.can_dispatch(3)
    slots.dispatch("a", 4)
    assert not slots.can_dispatch(4), "two groups of version 4 do not fit the one step that is left to them"


def test_a_batch_put_back_keeps_what_is_left_of_it() -> None:
    slots = Slots(batch=2, max_staleness=1)
    a, b, c, d = fill(slots)
    for group in (a, b, c):
        slots.complete(group, 0)
    slots.start_training([a, b])
    slots.put_back([b])
    assert slots.groups(Phase.COMPLETE) == [a, c] and slots.groups(Phase.GENERATING) == [d]
    assert slots.counts["requeued"] == 1 and slots.counts["dispatched"] == 3
    assert slots.next_batch() == [a, c], "the step goes on with what is complete"
    slots.dispatch(b, 0)


def test_moves_out_of_turn_are_refused() -> None:
    slots = Slots(batch=1, max_staleness=0)
    slots.dispatch("a", 0)
    with pytest.raises(SlotError, match="already outstanding"):
        slots.dispatch("a", 0)
    with pytest.raises(SlotError, match="expected complete"):
        slots.start_training(["a"])
    slots.complete("a", 0)
    with pytest.raises(SlotError, match="not newer"):
        slots.publish(0)


def test_the_age_check_at_consumption_is_real() -> None:
    slots = Slots(batch=1, max_staleness=1)
    slots.dispatch("a", 0)
    slots.complete("a", 0)
    slots.version = 2  # what a lost publish message would do
    with pytest.raises(SlotError, match="2 versions old"):
        slots.start_training(["a"])


class Machine:
    """Slots, with books of their own about every group that was ever issued."""

    def __init__(self, batch: int, max_staleness: int) -> None:
        self.slots = Slots(batch, max_staleness)
        self.issued = self.requeued = 0
        self.trained: list[str] = []
        self.uncommitted = 0
        self.given_up: list[str] = []
        self.consumed_ages: list[int] = []

    def dispatch(self, choice: int) -> None:
        actor_version = max(0, self.slots.version - choice % (self.slots.max_staleness + 2))
        if self.slots.can_dispatch(actor_version):
            self.slots.dispatch(f"g{self.issued}", actor_version)
            self.issued += 1

    def complete(self, choice: int) -> None:
        if group := pick(self.slots, Phase.GENERATING, choice):
            lowest = self.slots.version - self.slots.age(group)
            self.slots.complete(group, lowest + choice % (self.slots.version - lowest + 1))

    def start_training(self, choice: int) -> None:
        slots, complete = self.slots, self.slots.groups(Phase.COMPLETE)
        chosen = slots.next_batch()
        if chosen is None:
            assert (slots.blocking() is None) == (slots.training or len(complete) < slots.batch)
            return
        assert slots.blocking() is None
        ages = [slots.age(group) for group in chosen]
        left = [slots.age(group) for group in complete if group not in chosen]
        assert ages == sorted(ages, reverse=True), "oldest first"
        assert ages[-1] >= max(left, default=0), "nothing older is left behind"
        slots.start_training(chosen)

    def publish(self, choice: int) -> None:
        if self.slots.training:
            self.consumed_ages += [self.slots.age(group) for group in self.slots.groups(Phase.TRAINING)]
            freed = self.slots.publish(self.slots.version + 1)
            self.trained += freed
            self.uncommitted += len(freed)

    def requeue(self, choice: int) -> None:
        if group := pick(self.slots, Phase.GENERATING, choice):
            self.slots.requeue(group)
            self.requeued += 1

    def drop(self, choice: int) -> None:
        if group := pick(self.slots, Phase.GENERATING, choice):
            self.slots.drop(group, "age")
            self.given_up.append(group)

    def unblock(self, choice: int) -> None:
        """Oldest first, until training may go on."""
        while group := self.slots.blocking():
            ages = [self.slots.age(other) for other in self.slots.groups(Phase.GENERATING)]
            assert self.slots.next_batch() is None and self.slots.age(group) == max(ages)
            self.slots.drop(group, "age")
            self.given_up.append(group)

    def fail(self, choice: int) -> None:
        phase = (Phase.GENERATING, Phase.COMPLETE, Phase.TRAINING)[choice % 3]
        for group in self.slots.groups(phase)[: 1 if phase is not Phase.TRAINING else None]:
            self.slots.fail(group, "replay")
            self.given_up.append(group)

    def put_back(self, choice: int) -> None:
        if self.slots.training:
            lost = self.slots.groups(Phase.TRAINING)[: choice % (self.slots.batch + 1)]
            self.slots.put_back(lost)
            self.requeued += len(lost)

    def roll_back(self, choice: int) -> None:
        self.given_up += self.slots.roll_back(self.slots.version + 1, "learner lost")
        self.slots.untrain(self.uncommitted, "learner lost")
        if self.uncommitted:
            self.given_up += self.trained[-self.uncommitted :]
            del self.trained[-self.uncommitted :]
        self.uncommitted = 0

    def commit(self, choice: int) -> None:
        self.uncommitted = 0

    def check(self) -> None:
        counts, ended = self.slots.counts, [*self.trained, *self.given_up]
        assert counts["trained"] == len(self.trained) and len(ended) == len(set(ended))
        assert sum(n for key, n in counts.items() if key.startswith(("dropped", "failed"))) == len(self.given_up)
        assert counts["requeued"] == self.requeued
        assert self.issued - self.requeued == len(ended) + len(self.slots), "every group is somewhere, once"
        assert all(age <= self.slots.max_staleness for age in self.consumed_ages)


def pick(slots: Slots, phase: Phase, choice: int) -> str | None:
    """Any group of a phase."""
    groups = slots.groups(phase)
    return groups[choice % len(groups)] if groups else None


MOVES = (
    *(3 * (Machine.dispatch,) + 2 * (Machine.complete, Machine.start_training, Machine.publish)),
    *(Machine.requeue, Machine.drop, Machine.unblock, Machine.fail, Machine.put_back, Machine.roll_back),
    Machine.commit,
)


@settings(max_examples=300, deadline=None)
@given(
    batch=st.integers(1, 4),
    staleness=st.integers(0, 4),
    moves=st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 10**6)), max_size=200),
)
def test_any_interleaving_keeps_the_bound_and_every_group(batch: int, staleness: int, moves: list) -> None:
    machine = Machine(batch, staleness)
    for move, choice in moves:
        move(machine, choice)
        machine.check()
    # Liveness: once everything generating completes, a full machine can always train.
    slots = machine.slots
    for group in slots.groups(Phase.GENERATING):
        slots.complete(group, slots.version - slots.age(group))
    if not slots.training and len(slots.groups(Phase.COMPLETE)) >= batch:
        assert slots.next_batch() is not None
