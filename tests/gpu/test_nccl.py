"""A broadcast over real NCCL: a learner on one GPU, an engine on another."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.nccl_transfer import Broadcast, NcclGroup, NcclSender
from rollout.transport import make_sender
from rollout.weights import WeightManifest
from tests.rollout.stored import stored
from tests.rollout.test_engine_weights import build_qwen2, changed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.usefixtures("ray_local"),
]

DEADLINE_S = 120


@dataclass(frozen=True)
class Published:
    """One version with its digest, and the shards for whoever misses the broadcast."""

    manifest: WeightManifest
    digest: int
    shards: list[Any]


class Learner:
    """The learner's first rank, with a model and no training."""

    def __init__(self, directory: Path) -> None:
        from tests.rollout.conftest import reference_model

        self.model = reference_model(directory).to("cuda", torch.bfloat16)
        self.publisher = make_sender("nccl")
        self.sender: NcclSender | None = None

    def endpoint(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def publish(self, version: int) -> Published:
        changed(self.model.cpu(), seed=version)
        self.model.to("cuda")
        shards, link = stored(self.publisher, version, self._weights())
        return Published(link.manifest, link.digest, shards)

    def broadcast(self, manifest: WeightManifest, group: NcclGroup) -> None:
        if self.sender is None or self.sender.group != group:
            self.sender = NcclSender(group)
        self.sender.send(manifest, self._weights())

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(list(self.model.named_parameters()))


class Engine:
    """A rollout actor without its event loop."""

    def __init__(self, directory: Path) -> None:
        from rollout.engine import SoftEngine
        from tests.gpu.test_engine_gpu import gpu_spec

        self.engine = SoftEngine(gpu_spec(directory, dtype="bfloat16", transport="nccl", enforce_eager=True))

    def receive(self, broadcast: Broadcast) -> dict[str, str]:
        self.engine.receive_weights(broadcast)
        return self._checksums()

    def load(self, published: Published) -> dict[str, str]:
        self.engine.load_weights(published.manifest, published.shards)
        return self._checksums()

    def _checksums(self) -> dict[str, str]:
        (found,) = self.engine._core.collective_rpc("compute_weight_checksums")
        return found


def test_versions_arrive_to_the_bit_and_a_new_group_can_be_made(tmp_path: Path) -> None:
    import ray

    directory = build_qwen2(tmp_path, tied=True)
    learner = ray.remote(num_gpus=1)(Learner).remote(directory)
    engine = ray.remote(num_gpus=1)(Engine).remote(directory)

    def get(ref: Any) -> Any:
        return ray.get(ref, timeout=DEADLINE_S)

    try:
        groups = [NcclGroup("127.0.0.1", get(learner.endpoint.remote()), 1, 1, 60.0) for _ in range(2)]
        for version, group in ((1, groups[0]), (2, groups[0]), (3, groups[1])):
            published = get(learner.publish.remote(version))
            with ThreadPoolExecutor(1) as pool:
                sending = pool.submit(get, learner.broadcast.remote(published.manifest, group))
                received = get(engine.receive.remote(Broadcast(published.manifest, published.digest, group, 0)))
                sending.result(DEADLINE_S)
            assert received == get(engine.load.remote(published))
    finally:
        ray.kill(learner)
        ray.kill(engine)
