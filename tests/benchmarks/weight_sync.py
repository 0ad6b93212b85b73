"""Publishing 0.5 GB of bf16 weights to two actors, in memcpys of the same bytes.

One round: the sender hashes shards, Ray's object store takes them, two actors fetch, check and copy them into their own
parameters. The peer is what one would write first: a dict of torch tensors through `ray.put`.

The unit is a memcpy of the model tensor by tensor, as everything here must copy it. In one block it is up to twice as
fast: from a size on that depends on the processor's cache, libc writes past the caches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from rollout.nccl_transfer import TensorDigest
from rollout.transport import DeltaSender, FullSender, Link, Part, Receiver, Sender, WeightChain, make_receiver
from rollout.weights import iterate_weights
from tests.benchmarks._cluster import private_ray
from tests.benchmarks._timing import best_ratio, interleaved
from tests.benchmarks.row import Row
from tests.rollout.stored import stored

NUM_TENSORS, SHAPE = 32, (2048, 4096)
TOTAL = NUM_TENSORS * SHAPE[0] * SHAPE[1] * 2
NUM_ACTORS = 2
ROUNDS = 7
DEADLINE_S = 300
FLOOR = "floor 2 to 3: one copy in, two out on two cores that share the memory"


def model() -> dict[str, torch.Tensor]:
    """Random bf16 weights."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{i}.weight": torch.randint(-(2**15), 2**15, SHAPE, generator=generator, dtype=torch.int16).view(
            torch.bfloat16
        )
        for i in range(NUM_TENSORS)
    }


class Consumer:
    """A rollout actor without its engine: parameters of its own, and the product's receiver."""

    def __init__(self) -> None:
        self.parameters = {f"layers.{i}.weight": torch.zeros(SHAPE, dtype=torch.bfloat16) for i in range(NUM_TENSORS)}
        self.receiver = make_receiver("object_store")

    def ready(self) -> bool:
        """Whether the constructor is done."""
        return True

    def update(self, links: list[Link], references: list[Any], checked: bool) -> float:
        """Take a version; returns the seconds in which an engine would not have decoded."""
        import ray

        def fetch(first: int, count: int) -> Sequence[Part]:
            return ray.get(references[first : first + count], timeout=DEADLINE_S)

        shards = self.receiver.receive(links, fetch) if checked else fetch(0, links[-1].num_parts)
        start = time.perf_counter()
        for name, tensor in iterate_weights(links[-1].manifest, shards, verify=False):
            self.parameters[name].copy_(tensor)
        return time.perf_counter() - start

    def update_from_dict(self, references: list[Any]) -> float:
        """The peer."""
        import ray

        for name, tensor in ray.get(references[0], timeout=DEADLINE_S).items():
            self.parameters[name].copy_(tensor)
        return 0.0

    def take_digest(self) -> int:
        """To compare with the learner's; the parameters are zero afterwards."""
        found = digest(self.parameters)
        for tensor in self.parameters.values():
            tensor.zero_()
        return found


def digest(weights: dict[str, torch.Tensor]) -> int:
    """A number that depends on every element and its place."""
    watched = TensorDigest()
    for _ in watched.watch(weights.items()):
        pass
    return watched.value()


class Learner:
    """The driver's side of one sync; `pauses` collects the longest pause of each checked round."""

    def __init__(self, weights: dict[str, torch.Tensor], actors: list[Any]) -> None:
        self.weights, self.actors = weights, actors
        self.sender = FullSender()
        self.pauses: list[float] = []

    def sync(self, checked: bool) -> None:
        """From tensors here to parameters there."""
        import ray

        chain: WeightChain[Any] = WeightChain()
        references = []
        for part in self.sender.send(1, self.weights.items()):
            if isinstance(part, Link):
                chain.add(part, references)
            else:
                references.append(ray.put(part))
        calls = [actor.update.remote(chain.links, chain.references, checked) for actor in self.actors]
        pauses = ray.get(calls, timeout=DEADLINE_S)
        if checked:
            self.pauses.append(max(pauses))

    def sync_unchecked(self) -> None:
        """The same without hashing on either side."""
        with mock.patch("rollout.weights.shard_checksum", return_value=0):
            self.sync(checked=False)

    def all_arrive(self) -> bool:
        """Gate: every way brings every byte to every actor, whose parameters were zero before."""
        import ray

        want = digest(self.weights)
        for sync in (lambda: self.sync(checked=True), self.sync_unchecked, self.sync_dict):
            sync()
            found = ray.get([actor.take_digest.remote() for actor in self.actors], timeout=DEADLINE_S)
            if found != [want] * NUM_ACTORS:
                return False
        return True

    def sync_dict(self) -> None:
        """The peer."""
        import ray

        reference = ray.put(self.weights)
        ray.get([actor.update_from_dict.remote([reference]) for actor in self.actors], timeout=DEADLINE_S)


def transfer_rows() -> list[Row]:
    """Rows that move bytes through Ray."""
    with private_ray(num_cpus=NUM_ACTORS, object_store_mb=2500):
        import ray

        actors = [ray.remote(Consumer).remote() for _ in range(NUM_ACTORS)]
        ray.get([actor.ready.remote() for actor in actors], timeout=DEADLINE_S)
        learner = Learner(model(), actors)
        parts = [part for part in learner.sender.send(0, learner.weights.items()) if not isinstance(part, Link)]
        source = [data for part in parts for data in part]
        target = [np.full(len(data), 2, np.uint8) for data in source]  # zeros share one page
        block, copied_block = np.full(TOTAL, 1, np.uint8), np.full(TOTAL, 2, np.uint8)
        right = learner.all_arrive()
        learner.pauses.clear()
        seconds = interleaved(
            {
                "memcpy": lambda: [np.copyto(new, old) for new, old in zip(target, source, strict=True)],
                "block": lambda: np.copyto(copied_block, block),
                "put": lambda: [ray.put(part) for part in parts],
                "checked": lambda: learner.sync(checked=True),
                "unchecked": learner.sync_unchecked,
                "dict": learner.sync_dict,
            },
            ROUNDS,
        )
        pauses = learner.pauses[1:]
    memcpy = seconds["memcpy"]
    gate = "parameters equal" if right else "WRONG parameters"
    unit = (
        f"memcpy {1e3 * min(memcpy):.0f} ms for {TOTAL / 1e6:.0f} MB "
        f"({1e3 * min(seconds['block']):.0f} ms in one block); {gate}"
    )
    rows = []
    for case, values, target_ratio in (
        ("put", seconds["put"], 1.2),
        ("end_to_end", seconds["checked"], 12.0),
        ("end_to_end_unchecked", seconds["unchecked"], 8.0),
        ("pause", pauses, 2.0),
    ):
        detail = f"{1e3 * min(values):.0f} ms; {unit}; {FLOOR if 'end' in case else 'floor 1'}"
        ratio = best_ratio(values, memcpy)
        rows.append(Row(f"weight_sync/{case}", ratio, target_ratio, detail, at_most=True, right=right))
    # Like with like: the dict carries no checksums either.
    ratio = best_ratio(seconds["dict"], seconds["unchecked"])
    detail = (
        f"dict of torch tensors {min(seconds['dict']):.2f} s, ours {min(seconds['unchecked']):.2f} s without "
        f"checksums, {min(seconds['checked']):.2f} s with; {unit}"
    )
    return [*rows, Row("weight_sync/dict", ratio, 8.0, detail, right=right)]


def delta_row() -> Row:
    """Bytes of a full version over those of a delta at 1 % changed elements."""
    weights, sender, receiver = model(), DeltaSender(), make_receiver("delta")
    chain: WeightChain[Part] = WeightChain()
    deliver(sender, receiver, chain, 1, weights)
    change(weights, share=100)
    sent, send_s, receive_s, right = deliver(sender, receiver, chain, 2, weights)
    detail = (
        f"{sent / 1e6:.1f} MB for {TOTAL / 1e6:.0f} MB, 1 % of elements changed, "
        f"{'equal to the bit' if right else 'WRONG'}; send {send_s:.2f} s, receive {receive_s:.2f} s"
    )
    return Row("weight_sync/delta", TOTAL / sent, 30.0, detail, right=right)


def change(weights: dict[str, torch.Tensor], share: int) -> None:
    """Flip the last bit of one element in `share`."""
    generator = torch.Generator().manual_seed(1)
    for tensor in weights.values():
        flat = tensor.view(-1).view(torch.int16)
        flat[torch.randperm(flat.numel(), generator=generator)[: flat.numel() // share]] ^= 1


def deliver(
    sender: Sender, receiver: Receiver, chain: WeightChain[Part], version: int, weights: dict[str, torch.Tensor]
) -> tuple[int, float, float, bool]:
    """One version in one process: bytes sent, seconds to send and to receive, whether it arrived to the bit."""
    start = time.perf_counter()
    parts, link = stored(sender, version, weights.items())
    sent_at = time.perf_counter()
    chain.add(link, parts)
    shards = receiver.receive(chain.links, lambda first, count: chain.references[first : first + count])
    received_at = time.perf_counter()
    loaded = dict(iterate_weights(link.manifest, shards, verify=False))
    right = all(
        torch.equal(loaded[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in weights.items()
    )
    return sum(data.nbytes for part in parts for data in part), sent_at - start, received_at - sent_at, right


def run(names: set[str] | None) -> list[Row]:
    """Rows `weight_sync/put`, `/end_to_end`, `/end_to_end_unchecked`, `/pause`, `/dict` and `/delta`."""
    rows = [] if names == {"weight_sync/delta"} else transfer_rows()
    if names is None or "weight_sync/delta" in names:
        rows.append(delta_row())
    return [row for row in rows if names is None or row.name in names]
