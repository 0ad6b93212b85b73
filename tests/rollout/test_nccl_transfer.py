"""The NCCL path up to the wire: vLLM's real trainer engine, our client and source, and a queue in place of NCCL."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from rollout.nccl_transfer import EngineClient, NcclPlan, NcclSender, PolicySource, connect_workers, receive_policy
from rollout.weights import WeightError, pack_weights

PLAN = NcclPlan("10.0.0.1", 29_500, num_engines=2, tensor_parallel_size=2, deadline_s=5.0)


def weights() -> Iterator[tuple[str, torch.Tensor]]:
    yield "a", torch.arange(6.0).view(2, 3)
    yield "b", torch.ones(4, dtype=torch.bfloat16)


class Engine:
    """A rollout actor whose workers take broadcast tensors from a queue."""

    def __init__(self) -> None:
        self.wire: queue.Queue[tuple[str, torch.Tensor]] = queue.Queue()
        self.rpcs: list[str] = []
        self.init_info: dict[str, Any] = {}
        self.received: dict[str, torch.Tensor] = {}
        self.version = 0

    def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[None]:
        self.rpcs.append(method)
        if method == "init_weight_transfer_engine":
            (self.init_info,) = args
        elif method == "update_weights":
            for name, shape in zip(args[0]["names"], args[0]["shapes"], strict=True):
                sent, tensor = self.wire.get(timeout=5)
                if sent != name or list(tensor.shape) != shape:
                    raise RuntimeError(f"expected {name} {shape}, got {sent} {tuple(tensor.shape)}")
                self.received[name] = tensor
        return [None]

    def run(self, phase: str, payload: dict[str, Any]) -> None:
        """What the actor's engine thread does."""
        if phase == "connect":
            connect_workers(self, payload)
        else:
            receive_policy(self, payload["update_info"])
            self.version = payload["version"]


class Actors:
    """Calls and waits as Ray gives them."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.pool = ThreadPoolExecutor(len(engines))

    def call(self, engine: int, phase: str, payload: dict[str, Any]) -> Future[None]:
        return self.pool.submit(self.engines[engine].run, phase, payload)

    @staticmethod
    def wait(calls: Sequence[Future[None]], seconds: float) -> None:
        for future in calls:
            future.result(seconds)


def test_every_engine_gets_ranks_of_its_own() -> None:
    engines = [Engine(), Engine()]
    actors = Actors(engines)
    EngineClient(PLAN, actors.call, actors.wait).init_weight_transfer_engine({"world_size": 5, "rank_offset": 1})
    assert PLAN.world_size == 5
    assert [engine.init_info["rank_offset"] for engine in engines] == [1, 3]


@pytest.mark.slow
def test_versions_arrive_through_vllms_trainer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    nccl_engine = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine")
    engines = [Engine(), Engine()]
    opened = []

    class Group:
        def destroy(self) -> None:
            opened.append("closed")

    def open_endpoint(init_info: Any) -> Group:
        opened.append((init_info.master_address, init_info.master_port, init_info.world_size))
        return Group()

    def broadcast(iterator: Iterator[tuple[str, torch.Tensor]], **_: Any) -> None:
        for name, tensor in iterator:
            for engine in engines:
                engine.wire.put((name, tensor.clone()))

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", open_endpoint)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    manifest, _ = pack_weights(1, weights())
    current = dict(weights())
    actors = Actors(engines)
    sender = NcclSender(PLAN, PolicySource(manifest, lambda: current.items()), actors.call, actors.wait)
    for version in (2, 3):
        current = {name: tensor + version for name, tensor in current.items()}
        sender.send(version)
        for engine in engines:
            assert engine.version == version
            assert all(torch.equal(engine.received[name], tensor) for name, tensor in current.items())
    assert engines[0].rpcs == [
        "init_weight_transfer_engine",
        *["start_weight_update", "update_weights", "finish_weight_update"] * 2,
    ]
    assert engines[0].init_info["packed"] is True
    current = {"a": current["a"], "b": current["b"][:2]}
    with pytest.raises(ValueError, match="disagrees with iteration"):
        sender.send(4)
    with pytest.raises(WeightError, match="connect a new group"):
        sender.send(5)
    sender.close()
    assert opened == [("10.0.0.1", 29_500, 5), "closed"]
    assert [engine.version for engine in engines] == [3, 3]
