"""The staleness state machine: conservation, order and the bound, for any interleaving."""

from __future__ import annotations

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
    assert slots.blocking() == [b, c]
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
    assert slots.next_batch() is None
    slots.drop(b, "age")
    assert slots.next_batch() == [c]
    assert slots.counts["dropped/age"] == 1


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


@settings(max_examples=300, deadline=None)
@given(
    batch=st.integers(1, 4),
    staleness=st.integers(0, 4),
    moves=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 10**6)), max_size=200),
)
def test_any_interleaving_keeps_the_bound_and_every_group(batch: int, staleness: int, moves: list) -> None:
    slots = Slots(batch, staleness)
    issued, trained, ages = 0, [], []
    for move, choice in moves:
        generating, complete = slots.groups(Phase.GENERATING), slots.groups(Phase.COMPLETE)
        if move <= 1:
            actor_version = max(0, slots.version - choice % (staleness + 2))
            if slots.can_dispatch(actor_version):
                slots.dispatch(f"g{issued}", actor_version)
                issued += 1
        elif move == 2 and generating:
            group = generating[choice % len(generating)]
            lowest = slots.version - slots.age(group)
            slots.complete(group, lowest + choice % (slots.version - lowest + 1))
        elif move == 3 and (chosen := slots.next_batch()):
            ages += [slots.age(group) for group in chosen]
            slots.start_training(chosen)
        elif move == 4 and slots.training:
            trained += slots.publish(slots.version + 1)
        elif move == 5 and generating:
            group = generating[choice % len(generating)]
            slots.requeue(group) if choice % 2 else slots.drop(group, "age")
        elif move == 7 and slots.training:
            batch_in_training = slots.groups(Phase.TRAINING)
            slots.put_back(batch_in_training[: choice % (batch + 1)])
            for _ in batch_in_training:
                ages.pop()
        elif move == 6 and slots.training and choice % 2:
            for group in slots.groups(Phase.TRAINING):
                slots.drop(group, "learner lost")
            slots.publish(slots.version + 1)
        elif move == 6 and complete:
            slots.fail(complete[choice % len(complete)], "bad trajectory")
    assert all(age <= staleness for age in ages)
    assert len(trained) == len(set(trained)) == slots.counts["trained"]
    # Liveness: once everything generating completes, a full machine can always train.
    for group in slots.groups(Phase.GENERATING):
        slots.complete(group, slots.version - slots.age(group))
    if not slots.training and len(slots.groups(Phase.COMPLETE)) >= batch:
        assert slots.next_batch() is not None
