"""One conformance suite for every transport of weights, then what is particular to the delta."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.transport import (
    ANCHOR_EVERY,
    DeltaReceiver,
    Link,
    Part,
    Receiver,
    WeightChain,
    apply_changes,
    encode_changes,
    make_receiver,
    make_sender,
)
from rollout.weights import WeightError, iterate_weights
from tests.rollout.stored import stored

TRANSPORTS = ("object_store", "delta", "nccl")
SHARD = 4096
Model = dict[str, torch.Tensor]


def model(seed: int = 0) -> Model:
    """Three shards' worth of tensors in two dtypes, one of an odd number of bytes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.weight": torch.randn(20, 30, generator=generator).bfloat16() for i in range(7)}
    return tensors | {"norm": torch.randn(33, generator=generator), "odd": torch.arange(7).to(torch.uint8)}


def trained(weights: Model, step: int, share: float = 0.01) -> Model:
    """The next version: a share of the elements moves by one step."""
    generator = torch.Generator().manual_seed(1000 + step)
    moved = {}
    for name, tensor in weights.items():
        mask = torch.rand(tensor.shape, generator=generator) < share
        moved[name] = torch.where(mask, tensor + 1, tensor)
    return moved


class Publisher:
    """A learner and a driver in one process: what a receiver is given, with every part a copy, as in the store."""

    def __init__(self, transport: str, anchor_every: int = ANCHOR_EVERY) -> None:
        self.sender = make_sender(transport, max_shard_bytes=SHARD, anchor_every=anchor_every)
        self.chain: WeightChain[Part] = WeightChain()
        self.fetched = 0

    def publish(self, version: int, weights: Model) -> None:
        parts, link = stored(self.sender, version, weights.items())
        self.chain.add(link, parts)

    def fetch(self, first: int, count: int) -> list[Part]:
        self.fetched += sum(data.nbytes for part in self.chain.references[first : first + count] for data in part)
        return self.chain.references[first : first + count]

    def deliver(self, receiver: Receiver) -> Model:
        shards = receiver.receive(self.chain.links, self.fetch)
        loaded = iterate_weights(self.chain.links[-1].manifest, shards)
        return {name: tensor.clone() for name, tensor in loaded}


def assert_equal(found: Model, want: Model) -> None:
    assert list(found) == list(want)
    for name in want:
        assert found[name].dtype == want[name].dtype
        assert found[name].shape == want[name].shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), want[name].reshape(-1).view(torch.uint8)), name


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def versions(count: int) -> Iterator[tuple[int, Model]]:
    weights = model()
    for version in range(1, count + 1):
        yield version, weights
        weights = trained(weights, version)


def test_bit_equal_after_every_one_of_many_syncs(transport: str) -> None:
    publisher, receiver = Publisher(transport, anchor_every=7), make_receiver(transport)
    for version, weights in versions(40):
        publisher.publish(version, weights)
        assert_equal(publisher.deliver(receiver), weights)
        assert publisher.chain.links[-1].manifest.version == version


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(TRANSPORTS), st.lists(st.booleans(), min_size=1, max_size=14), st.integers(1, 5))
def test_versions_may_be_skipped(transport: str, taken: list[bool], anchor_every: int) -> None:
    publisher, receiver = Publisher(transport, anchor_every), make_receiver(transport)
    for (version, weights), take in zip(versions(len(taken)), taken, strict=True):
        publisher.publish(version, weights)
        if take:
            assert_equal(publisher.deliver(receiver), weights)


def test_a_late_receiver_gets_the_newest_version(transport: str) -> None:
    publisher = Publisher(transport)
    for version, weights in versions(5):
        publisher.publish(version, weights)
    assert_equal(publisher.deliver(make_receiver(transport)), weights)


def test_the_same_version_twice_is_harmless(transport: str) -> None:
    publisher, receiver = Publisher(transport), make_receiver(transport)
    weights = model()
    publisher.publish(3, weights)
    for _ in range(2):
        assert_equal(publisher.deliver(receiver), weights)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_torn_part_is_refused_and_the_next_version_arrives(transport: str, shard: int) -> None:
    publisher, receiver = Publisher(transport), make_receiver(transport)
    first, second, third = (weights for _, weights in versions(3))
    publisher.publish(1, first)
    publisher.deliver(receiver)
    publisher.publish(2, second)
    good = publisher.chain.references
    cuts = (lambda part: [data[:-1] for data in part], lambda part: part[:-1], lambda part: part[:0])
    for torn in (lambda part: [data ^ 1 for data in part], *cuts):
        publisher.chain.references = [torn(part) if index % 3 == shard else part for index, part in enumerate(good)]
        with pytest.raises(WeightError):
            publisher.deliver(receiver)
    publisher.chain.references = good
    assert_equal(publisher.deliver(receiver), second)
    publisher.publish(3, third)
    assert_equal(publisher.deliver(receiver), third)


def test_a_fetch_that_fails_half_way_leaves_a_usable_receiver(transport: str) -> None:
    publisher, receiver = Publisher(transport), make_receiver(transport)
    for version, weights in versions(4):
        publisher.publish(version, weights)
        if version == 1:
            publisher.deliver(receiver)

    def broken(first: int, count: int) -> list[Part]:
        if first + count == len(publisher.chain.references):
            raise TimeoutError("the object store did not answer within 1 s")
        return publisher.fetch(first, count)

    with pytest.raises(TimeoutError):
        receiver.receive(publisher.chain.links, broken)
    assert_equal(publisher.deliver(receiver), weights)


def test_a_version_left_half_sent_does_not_spoil_the_next(transport: str) -> None:
    publisher, receiver = Publisher(transport), make_receiver(transport)
    all_versions = list(versions(4))
    for version, weights in all_versions[:2]:
        publisher.publish(version, weights)
        publisher.deliver(receiver)
    half_sent = publisher.sender.send(3, all_versions[2][1].items())
    next(half_sent)
    next(half_sent)
    half_sent.close()
    publisher.publish(4, all_versions[3][1])
    assert_equal(publisher.deliver(receiver), all_versions[3][1])
    assert_equal(publisher.deliver(make_receiver(transport)), all_versions[3][1])


def test_a_version_whose_parts_are_gone_is_sent_again(transport: str) -> None:
    publisher, behind, beyond = Publisher(transport), make_receiver(transport), make_receiver(transport)
    first, second, third = (weights for _, weights in versions(3))
    publisher.publish(1, first)
    publisher.deliver(behind)
    publisher.publish(2, second)
    publisher.deliver(beyond)
    publisher.chain.references = [[data ^ 1 for data in part] for part in publisher.chain.references]
    with pytest.raises(WeightError):
        publisher.deliver(behind)
    publisher.publish(2, second)
    assert publisher.chain.links[-1].base_version is None
    for receiver in (behind, beyond, make_receiver(transport)):
        assert_equal(publisher.deliver(receiver), second)
    publisher.publish(3, third)
    for receiver in (behind, beyond):
        assert_equal(publisher.deliver(receiver), third)


def test_a_value_that_comes_back_is_a_change(transport: str) -> None:
    publisher, receiver = Publisher(transport), make_receiver(transport)
    for version, value in enumerate((0.0, 1.0, 0.0, 2.0, 1.0), start=1):
        weights = model() | {"norm": torch.full((33,), value)}
        publisher.publish(version, weights)
        assert_equal(publisher.deliver(receiver), weights)


def test_a_receiver_of_the_other_transport_says_so() -> None:
    publisher = Publisher("delta")
    for version, weights in versions(2):
        publisher.publish(version, weights)
    with pytest.raises(WeightError, match="same transport on both ends"):
        publisher.deliver(make_receiver("object_store"))


def test_a_delta_is_small_and_an_anchor_comes_when_due() -> None:
    publisher, receiver = Publisher("delta", anchor_every=4), make_receiver("delta")
    bases, sizes = [], []
    for version, weights in versions(9):
        publisher.publish(version, weights)
        bases.append(publisher.chain.links[-1].base_version)
        publisher.fetched = 0
        publisher.deliver(receiver)
        sizes.append(publisher.fetched)
    assert bases == [None, 1, 2, 3, None, 5, 6, 7, None]
    assert max(size for size, base in zip(sizes, bases, strict=True) if base) < min(sizes[::4]) / 15


def test_a_changed_base_is_healed_from_the_anchor() -> None:
    publisher, receiver = Publisher("delta"), DeltaReceiver()
    all_versions = list(versions(3))
    for version, weights in all_versions[:2]:
        publisher.publish(version, weights)
        publisher.deliver(receiver)
    receiver._shards[1][0][5] ^= 1
    publisher.publish(*all_versions[2])
    publisher.fetched = 0
    assert_equal(publisher.deliver(receiver), all_versions[2][1])
    assert publisher.fetched > publisher.chain.links[-1].manifest.num_bytes


def test_an_earlier_part_that_is_torn_is_found() -> None:
    publisher = Publisher("delta")
    for version, weights in versions(3):
        publisher.publish(version, weights)
    publisher.chain.references[0] = [data ^ 4 for data in publisher.chain.references[0]]
    with pytest.raises(WeightError, match="version 3, shard 0: checksum"):
        publisher.deliver(make_receiver("delta"))


def test_other_tensors_are_refused_and_then_anchored() -> None:
    publisher = Publisher("delta")
    weights = model()
    publisher.publish(1, weights)
    for changed in (weights | {"norm": torch.zeros(34)}, {"layers.0.weight": weights["layers.0.weight"]}):
        with pytest.raises(WeightError, match="anchor"):
            publisher.publish(2, changed)
        publisher.publish(3, changed)
        assert publisher.chain.links[-1].base_version is None
        assert_equal(publisher.deliver(make_receiver("delta")), changed)


def test_a_chain_refuses_links_that_do_not_continue_it() -> None:
    publisher = Publisher("delta")
    links = []
    for version, weights in versions(3):
        publisher.publish(version, weights)
        links.append(publisher.chain.links[-1])
    chain: WeightChain[int] = WeightChain()
    with pytest.raises(WeightError, match="newest one is None"):
        chain.add(links[1], [0] * links[1].num_parts)
    chain.add(links[0], [0] * links[0].num_parts)
    with pytest.raises(WeightError, match="newest one is 1"):
        chain.add(links[2], [0] * links[2].num_parts)
    with pytest.raises(WeightError, match="0 parts"):
        chain.add(links[1], [])


@settings(deadline=None, max_examples=80)
@given(
    length=st.sampled_from([1, 2, 7, 100, 2 * 65_535, 2 * 65_535 + 2, 300_001]),
    changes=st.sampled_from([0, 1, 3, 100, 10**6]),
    seed=st.integers(0, 2**31),
)
def test_changes_are_lossless(length: int, changes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    old = generator.integers(0, 256, length, np.uint8)
    new = old.copy()
    new[generator.integers(0, length, changes)] = generator.integers(0, 256, changes)
    part = encode_changes(old, new)
    apply_changes(old, part, "shard")
    assert np.array_equal(old, new)
    assert len(part) <= length + 8
    if changes < 200:
        assert len(part) <= 8 + 1 + 4 * (changes + length // 131_070 + 1) or len(part) == length + 8


def test_the_last_byte_of_an_odd_shard_is_not_forgotten() -> None:
    old = np.zeros(1001, np.uint8)
    new = old.copy()
    new[-1] = 9
    apply_changes(old, encode_changes(old, new), "shard")
    assert np.array_equal(old, new)


def test_parts_that_cannot_be_applied_are_refused() -> None:
    old, new = np.zeros(1000, np.uint8), np.zeros(1000, np.uint8)
    new[500] = 1
    part = encode_changes(old, new)
    with pytest.raises(WeightError, match="shard 0: a change at word"):
        apply_changes(np.zeros(100, np.uint8), part, "shard 0")
    for torn in (part[:4], part[:-1], np.concatenate([part, part])):
        with pytest.raises(WeightError, match="shard 0"):
            apply_changes(old, torn, "shard 0")


def test_the_driver_needs_no_torch() -> None:
    code = "import sys, rollout.transport; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("transport", ["object_store", "delta"])  # nccl stores and fetches like object_store
def test_a_receiver_may_be_slow_or_killed_while_it_fetches(transport: str) -> None:
    """Through Ray: the parts are owned by the driver, so neither a dead learner nor a dead receiver loses them.

    Whoever is still fetching a version keeps it alive, although the chain has moved on.
    """
    import ray

    @ray.remote
    class Learner:
        def __init__(self) -> None:
            self.sender, self.weights = make_sender(transport, max_shard_bytes=SHARD), model()

        def publish(self, version: int) -> Iterator[Part | Link]:
            if version > 1:
                self.weights = trained(self.weights, version)
            yield from self.sender.send(version, self.weights.items())

    @ray.remote(max_concurrency=2)
    class Rollout:
        def __init__(self) -> None:
            self.receiver = make_receiver(transport)
            self.fetching, self.stalled = False, threading.Event()

        def is_fetching(self) -> bool:
            return self.fetching

        def proceed(self) -> None:
            self.stalled.clear()

        def update(self, links: list[Link], references: list[ray.ObjectRef], stall: bool) -> Model:
            if stall:
                self.stalled.set()

            def fetch(first: int, count: int) -> list[Part]:
                self.fetching = True
                deadline = time.monotonic() + 60
                while self.stalled.is_set() and time.monotonic() < deadline:
                    time.sleep(0.02)
                return ray.get(references[first : first + count], timeout=30)

            shards = self.receiver.receive(links, fetch)
            return {name: tensor.clone() for name, tensor in iterate_weights(links[-1].manifest, shards)}

    learner, chain = Learner.remote(), WeightChain()
    rollout, slow, other = Rollout.remote(), Rollout.remote(), Rollout.remote()

    def wait_for_fetch(actor: Any) -> None:
        deadline = time.monotonic() + 30
        while not ray.get(actor.is_fetching.remote(), timeout=30):
            assert time.monotonic() < deadline, "the receiver never began to fetch"
            time.sleep(0.02)

    weights = model()
    for version in (1, 2, 3):
        weights = weights if version == 1 else trained(weights, version)
        references = list(learner.publish.options(num_returns="streaming").remote(version))
        chain.add(ray.get(references[-1], timeout=30), references[:-1])
        assert_equal(ray.get(other.update.remote(chain.links, chain.references, False), timeout=60), weights)
        if version == 2:
            rollout.update.remote(chain.links, chain.references, True)
            wait_for_fetch(rollout)
            ray.kill(rollout)
            rollout = Rollout.remote()
            second, held = weights, slow.update.remote(chain.links, chain.references, True)
            wait_for_fetch(slow)
            references = []
    ray.get(slow.proceed.remote(), timeout=30)
    assert_equal(ray.get(held, timeout=60), second)
    ray.kill(learner)
    for actor in (rollout, slow):
        assert_equal(ray.get(actor.update.remote(chain.links, chain.references, False), timeout=60), weights)
    assert len(list(itertools.chain(chain.references))) == sum(link.num_parts for link in chain.links)
