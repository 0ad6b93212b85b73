"""The engine worker's end of a broadcast: vLLM's NCCL engine with a digest of what it received (tested: vLLM 0.32)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

from rollout.nccl_transfer import BACKEND, Broadcast, NcclGroup, TensorDigest, TransferError, check_joined, deadline

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker


class CheckedNcclEngine(NCCLWeightTransferEngine):  # type: ignore[misc]
    """Counts every tensor into a digest before the model loads it."""

    model: Any
    group: NcclGroup | None = None
    """The group that it has joined."""
    received = 0
    """Digest of the last version."""

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive and load one version."""
        digest, model = TensorDigest(), self.model
        self.model = SimpleNamespace(load_weights=lambda weights: model.load_weights(digest.watch(weights)))
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model
        self.received = digest.value()


def register_backend() -> None:
    """Make `BACKEND` known to vLLM, once per process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, CheckedNcclEngine)


def receive(worker: Worker, broadcast: Broadcast) -> None:
    """Load one version that the learner broadcasts now, joining its group first where that is new.

    Raises `TransferError` or what vLLM raised; the model is torn then and must not run.
    """
    engine: Any = worker.weight_transfer_engine
    if not isinstance(engine, CheckedNcclEngine):
        raise TransferError("this engine was not started with transport: nccl")
    # A step returns while the next batch waits on the main stream; what arrives is written on streams of its own.
    worker.synchronize_device()
    group, manifest = broadcast.group, broadcast.manifest
    if engine.group != group:
        engine.shutdown()
        init_info = NCCLWeightTransferInitInfo(
            master_address=group.master_address,
            master_port=group.master_port,
            rank_offset=group.rank_offset(broadcast.engine),
            world_size=group.world_size,
            packed=True,
        )
        worker.init_weight_transfer_engine(worker_init_payload(init_info))
        check_joined(engine.model_update_group)
        engine.group = group
    update = {
        "names": [entry.name for entry in manifest.entries],
        "dtype_names": [entry.dtype for entry in manifest.entries],
        "shapes": [list(entry.shape) for entry in manifest.entries],
    }
    with deadline(engine.model_update_group, group.deadline_s, f"version {manifest.version} over NCCL"):
        worker.start_weight_update()
        worker.update_weights(update)
        worker.finish_weight_update()
    if engine.received != broadcast.digest:
        raise TransferError(
            f"version {manifest.version} over NCCL: digest {engine.received:x}, need {broadcast.digest:x}"
        )
