"""vLLM's worker, which tells our model state which requests are preempted, and loads policies in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform

from rollout import cpu_kernels
from rollout.vllm_soft import register_classes

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

if TYPE_CHECKING:
    from rollout.nccl_transfer import Broadcast
    from rollout.weights import Shard, WeightManifest


class SoftWorker(PlatformWorker):  # type: ignore[misc, valid-type]
    """One tensor-parallel rank."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Worker processes of a tensor-parallel engine start without our entry point when the code is a working_dir.
        register_classes()
        cpu_kernels.install()
        super().__init__(*args, **kwargs)
        if self.vllm_config.weight_transfer_config is not None:
            from rollout.vllm_transfer import register_backend

            register_backend()

    def execute_model(self, scheduler_output: Any) -> Any:
        """Before the runner forgets finished and preempted requests alike, say which are which."""
        state = getattr(self.model_runner, "model_state", None)
        if state is not None:
            finished = set(scheduler_output.finished_req_ids)
            state.preempting = frozenset(scheduler_output.preempted_req_ids or ()) - finished
            state.forget(finished)
        return super().execute_model(scheduler_output)

    def load_policy(self, manifest: WeightManifest, shards: Sequence[Shard]) -> int:
        """Replace the weights in place between two steps; returns the version now served."""
        from rollout.weights import iterate_weights

        # The engine's caller has verified the shards, while decoding went on; again here would lengthen the pause.
        self.model_runner.reload_weights(weights_iterator=iterate_weights(manifest, shards, verify=False))
        return self._serve(manifest.version)

    def receive_policy(self, broadcast: Broadcast) -> int:
        """The same from the learner's broadcast. After an exception the model is torn and must not run."""
        from rollout.vllm_transfer import receive

        receive(self, broadcast)
        return self._serve(broadcast.manifest.version)

    def _serve(self, version: int) -> int:
        if current_platform.is_cpu():
            repack_tied_head(self.model_runner.get_model())
        self.model_runner.model_state.policy_version = version
        return version

    def soft_counters(self) -> dict[str, int]:
        """Resumptions and rebuilt rows, for tests and statistics."""
        state = self.model_runner.model_state
        return {**state.counters, "stashes": state.num_stashed, "version": state.policy_version}


def repack_tied_head(model: torch.nn.Module) -> None:
    """Pack the output head again if it shares the embedding.

    On a CPU vLLM multiplies with a packed copy of each weight. A reload packs the layers whose weights arrive; a tied
    head receives none, so it would go on multiplying with the old embedding.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    head, embedding = getattr(model, "lm_head", None), model.get_submodule("model.embed_tokens")
    if head is not None and head is not embedding and head.weight.data_ptr() == embedding.weight.data_ptr():
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
    elif head is embedding:
        dispatch_cpu_unquantized_gemm(embedding, remove_weight=False)
