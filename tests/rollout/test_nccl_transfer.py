"""The broadcast up to the wire: vLLM's trainer engine and a real CPU engine on its own NCCL path, a queue for NCCL."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout import nccl_transfer
from rollout.nccl_transfer import Broadcast, NcclGroup, NcclSender, TensorDigest, TransferError, deadline
from rollout.transport import Link, make_sender
from rollout.weights import WeightManifest
from tests.rollout.conftest import EngineFactory, reference_model
from tests.rollout.stored import stored
from tests.rollout.test_engine_weights import build_qwen2, changed, check_scored_by, generate, request

GROUP = NcclGroup("10.0.0.1", 29_500, num_engines=1, tensor_parallel_size=1, deadline_s=20.0)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "bf16": torch.randn(3, 5, generator=generator).bfloat16(),
        "fp32": torch.randn(7, generator=generator),
        "odd": torch.arange(9, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "long": torch.randn(67, generator=generator),
    }


def digest_of(named: dict[str, torch.Tensor]) -> int:
    digest = TensorDigest()
    assert list(digest.watch(named.items())) == list(named.items())
    return digest.value()


def test_a_digest_depends_on_every_bit_and_on_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_transfer, "DIGEST_CHUNK", 32)
    weights = tensors()
    whole = digest_of(weights)
    assert digest_of({name: tensor.clone() for name, tensor in weights.items()}) == whole
    assert 0 <= whole < 2**63
    for name in ("bf16", "fp32", "odd", "long"):
        for position in (0, 1, -1):
            flipped = {**weights, name: weights[name].clone()}
            flipped[name].view(-1).view(torch.uint8)[position] ^= 0x80
            assert digest_of(flipped) != whole, (name, position)
    swapped = weights["long"].clone()
    swapped[[0, -1]] = swapped[[-1, 0]]
    assert digest_of({**weights, "long": swapped}) != whole
    assert digest_of(dict(reversed(weights.items()))) != whole
    assert digest_of({name: tensor for name, tensor in weights.items() if name != "odd"}) != whole
    assert digest_of({**weights, "fp32": torch.cat([weights["fp32"], torch.zeros(1)])}) != whole
    assert digest_of({}) == 0


def test_a_digest_is_of_values_not_of_memory() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert digest_of({"w": matrix.t().contiguous()}) == digest_of({"w": matrix.t()})


def test_ranks_of_a_group() -> None:
    group = replace(GROUP, num_engines=2, tensor_parallel_size=4)
    assert group.world_size == 9
    assert [group.rank_offset(engine) for engine in range(2)] == [1, 5]


class Wire:
    """One NCCL communicator per rank that has joined; a broadcast is a queue per rank."""

    def __init__(self) -> None:
        self.queues: dict[int, queue.Queue[torch.Tensor]] = {}
        self.joined: list[tuple[int, int]] = []
        self.lose_after: int | None = None
        """Tensors after which nothing arrives any more."""
        self.spoil: str | None = None
        """Name of a tensor that arrives with one bit changed."""
        self.missing = False
        """Where libnccl cannot be loaded vLLM's communicator is disabled from the start."""

    def join(self, port: int, rank: int) -> Rank:
        self.joined.append((port, rank))
        if rank:
            self.queues[rank] = queue.Queue()
        return Rank(self, rank, disabled=self.missing)


class Rank:
    """vLLM's communicator, as far as it is used."""

    def __init__(self, wire: Wire, rank: int, *, disabled: bool = False) -> None:
        self.wire, self.rank, self.disabled = wire, rank, disabled

    def destroy(self) -> None:
        self.disabled = True

    def take(self) -> torch.Tensor:
        while not self.disabled:
            try:
                return self.wire.queues[self.rank].get(timeout=0.02)
            except queue.Empty:
                continue
        raise RuntimeError("NCCL error: aborted")


def produce(iterator: Iterator[tuple[str, torch.Tensor]], group: Rank, **_: Any) -> None:
    for number, (name, tensor) in enumerate(iterator):
        if number == group.wire.lose_after:
            while not group.disabled:
                time.sleep(0.02)
            return
        sent = tensor.detach().clone()
        if name == group.wire.spoil:
            sent.view(-1).view(torch.uint8)[5] ^= 1
        for receiver in group.wire.queues.values():
            receiver.put(sent)


def consume(iterator: Iterator[Any], group: Rank, post_unpack_func: Any, **_: Any) -> None:
    for name, (shape, dtype) in iterator:
        tensor = group.take()
        assert (list(tensor.shape), tensor.dtype) == (list(shape), dtype)
        post_unpack_func([(name, tensor)])


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """vLLM's NCCL modules on a queue."""
    nccl_engine = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine")
    made = Wire()
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: made.join(info.master_port, 0))
    monkeypatch.setattr(
        nccl_engine, "worker_init_process_group", lambda info, _: made.join(info.master_port, info.rank_offset)
    )
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", produce)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_consumer", consume)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    return made


class Learner:
    """Publishes a model the product's way, then broadcasts it."""

    def __init__(self) -> None:
        self.publisher = make_sender("nccl")
        self.sender: NcclSender | None = None

    def publish(self, version: int, model: Any) -> tuple[Link, list[Any]]:
        shards, link = stored(self.publisher, version, named(model))
        return link, shards

    def broadcast(self, manifest: WeightManifest, model: Any, group: NcclGroup) -> None:
        if self.sender is None or self.sender.group != group:
            self.sender = NcclSender(group)
        self.sender.send(manifest, iter(named(model)))


def named(model: Any) -> list[tuple[str, torch.Tensor]]:
    """As the learner sends them: a tied head not twice."""
    return list(model.named_parameters())


@pytest.mark.slow
def test_broadcast_versions_are_served_to_the_bit(
    wire: Wire, start_engine: EngineFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every version equals what the object store would have brought; a bad or lost one is refused."""
    # A lost version leaves a model without data, and vLLM shares rotary tables among all models of a process.
    monkeypatch.setattr("vllm.model_executor.layers.rotary_embedding._ROPE_DICT", {})
    directory = build_qwen2(tmp_path, tied=True)
    model, learner = reference_model(directory), Learner()
    requests = [request(index, thinking="soft" if index < 2 else "discrete") for index in range(4)]

    def deliver(version: int, group: NcclGroup, **changes: Any) -> None:
        link, _ = learner.publish(version, model)
        assert link.digest is not None
        broadcast = replace(Broadcast(link.manifest, link.digest, group, 0), **changes)
        sending = pool.submit(learner.broadcast, link.manifest, model, group)
        try:
            engine.receive_weights(broadcast)
        finally:
            error = sending.exception(timeout=30)
        if error is not None:
            raise error

    with start_engine(directory, transport="nccl") as engine, ThreadPoolExecutor(1) as pool:
        for version in (1, 2):
            changed(model, seed=version)
            deliver(version, GROUP)
            assert engine.version == version
            trajectories = generate(engine, requests, max_new_tokens=24, thinking_budget=8)
            assert all((trajectory.versions == version).all() for trajectory in trajectories)
            assert sum(check_scored_by(model, trajectory) for trajectory in trajectories) >= 8
        assert wire.joined == [(29_500, 0), (29_500, 1)] or wire.joined == [(29_500, 1), (29_500, 0)]
        sums = checksums(engine)

        # The object store brings the same bytes to whoever was not in the group, and a new group the next version.
        link, shards = learner.publish(2, model)
        engine.load_weights(link.manifest, shards)
        assert checksums(engine) == sums
        changed(model, seed=3)
        moved = replace(GROUP, master_port=29_501)
        deliver(3, moved)
        assert checksums(engine) != sums
        assert {port for port, _ in wire.joined[2:]} == {29_501}

        wire.spoil = "model.layers.0.mlp.down_proj.weight"
        with pytest.raises(TransferError, match="version 4 over NCCL: digest"):
            deliver(4, moved)
        wire.spoil, wire.lose_after = None, 5
        with pytest.raises(TransferError, match="not done after 1 s, aborted"):
            deliver(5, replace(GROUP, master_port=29_502, deadline_s=1.0))
        assert engine.version == 3


def checksums(engine: Any) -> dict[str, str]:
    (found,) = engine._core.collective_rpc("compute_weight_checksums")
    return found


@pytest.mark.slow
def test_a_sender_checks_what_it_sends(wire: Wire) -> None:
    weights = {name: tensor for name, tensor in tensors().items() if name != "empty"}
    *_, link = make_sender("nccl").send(1, weights.items())
    sender = NcclSender(GROUP)
    wire.join(GROUP.master_port, 1)
    sender.send(link.manifest, iter(weights.items()))
    assert [wire.queues[1].get_nowait().dtype for _ in weights] == [tensor.dtype for tensor in weights.values()]
    with pytest.raises(ValueError, match="yielded 2 parameters"):
        sender.send(link.manifest, iter(dict(itertools.islice(weights.items(), 2)).items()))


class StandInWorker:
    """Writes down what its model is told; a member of `GROUP`, or about to join it."""

    def __init__(self, wire: Wire, *, joined: bool) -> None:
        from rollout.vllm_transfer import CheckedNcclEngine

        self.calls: list[str] = []
        self.wire = wire
        self.weight_transfer_engine = engine = object.__new__(CheckedNcclEngine)
        engine.group, engine.model_update_group = None, None
        if joined:
            engine.group, engine.model_update_group = GROUP, wire.join(GROUP.master_port, 1)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.weight_transfer_engine.model_update_group = self.wire.join(init_info["master_port"], 1)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append(name)


EMPTY = Broadcast(WeightManifest(1, (), ()), 0, GROUP, 0)


@pytest.mark.slow
def test_a_step_that_was_launched_ends_before_the_first_byte_is_written(wire: Wire) -> None:
    """On a GPU the next batch is queued when a step returns, and NCCL writes on another stream."""
    from rollout.vllm_transfer import receive

    worker: Any = StandInWorker(wire, joined=True)
    receive(worker, EMPTY)
    assert worker.calls == ["synchronize_device", "start_weight_update", "update_weights", "finish_weight_update"]


@pytest.mark.slow
def test_a_process_without_nccl_says_so(wire: Wire) -> None:
    from rollout.vllm_transfer import receive

    wire.missing = True
    with pytest.raises(TransferError, match="NCCL is not available here"):
        NcclSender(GROUP)
    worker: Any = StandInWorker(wire, joined=False)
    with pytest.raises(TransferError, match="NCCL is not available here"):
        receive(worker, EMPTY)
    assert "start_weight_update" not in worker.calls


def test_whoever_waits_in_nccl_is_let_go_at_the_deadline() -> None:
    rank = Rank(Wire(), 1)
    rank.wire.queues[1] = queue.Queue()
    with pytest.raises(TransferError, match="version 7: not done after 0 s"), deadline(rank, 0.1, "version 7"):
        rank.take()
    silent = Rank(Wire(), 1)
    with pytest.raises(TransferError), deadline(silent, 0.05, "after an abort vLLM's calls return quietly"):
        time.sleep(0.2)
    in_time = Rank(Wire(), 1)
    with deadline(in_time, 60.0, "nothing to wait for"):
        pass
    with pytest.raises(KeyError), deadline(in_time, 60.0, "an error of its own"):
        raise KeyError
    assert not in_time.disabled
