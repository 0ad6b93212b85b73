"""One learner rank as a Ray actor: a thin shell around `Trainer` that moves data and sets the environment.

Importable without torch: everything heavy is imported in `start`, on the worker, after the environment is set.
Methods run one at a time on the main thread; a collective phase is a call on every rank.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.saved import SavedPart
from learner.spec import LearnerError, LearnerSpec, Refused, ScoredGroup
from rollout.lean_imports import lean_imports
from rollout.nccl_transfer import NcclGroup, NcclSender, TransferError
from rollout.transport import Link, Part, Sender, make_sender
from rollout.weights import VERSION_VARIABLE

if TYPE_CHECKING:
    from learner.trainer import Trainer
    from rollout.weights import WeightManifest

logger = logging.getLogger(__name__)


class LearnerRank:
    """Rank `rank` of a learner group; the group wraps this class with `ray.remote`."""

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self.spec = spec
        self.rank = rank
        self._trainer: Trainer | None = None
        self._groups: list[ScoredGroup] = []
        """Fetched for the next step."""
        self._sender: Sender = make_sender(spec.transport, max_shard_bytes=spec.shard_bytes)
        self._broadcaster: NcclSender | None = None

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port of this rank's node, for the process group of one generation."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return address, probe.getsockname()[1]

    def start(self, master: tuple[str, int], checkpoint: str | None) -> dict[str, Any]:
        """Join the process group, load the model and, when given, a checkpoint; collective."""
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.spec.world_size),
            "LOCAL_RANK": "0",
            "LOCAL_SIZE": "1",
            "MASTER_ADDR": master[0],
            "MASTER_PORT": str(master[1]),
            "DS_ACCELERATOR": self.spec.device,
        }
        with lean_imports():
            import deepspeed  # noqa: F401
            import transformers.models.auto.modeling_auto  # noqa: F401

            from learner.trainer import Trainer

        self._trainer = Trainer(self.spec, self.rank, None if checkpoint is None else Path(checkpoint))
        self._give_memory_back()
        return {"rank": self.rank, "pid": os.getpid(), **self._trainer.describe()}

    def fetch(self, groups: Sequence[ScoredGroup]) -> list[str]:
        """Bring the batches of the next `train` here; ids of groups whose batch exists nowhere any more.

        Not part of `train`: a rank that lacks a batch must not leave its peers alone in a collective.
        """
        import ray
        from ray.exceptions import ObjectLostError

        deadline = time.monotonic() + self.spec.sync_timeout_s
        ray.wait([group.batch for group in groups], num_returns=len(groups), timeout=self.spec.sync_timeout_s)
        self._groups, lost = [], []
        for group in groups:
            try:
                batch = ray.get(group.batch, timeout=max(0.0, deadline - time.monotonic()))
            except ObjectLostError:
                lost.append(group.group_id)
            else:
                self._groups.append(replace(group, batch=batch))
        return lost

    def train(self, step: int) -> dict[str, float]:
        """Training step number `step` on what was fetched; collective."""
        groups, self._groups = self._groups, []
        try:
            return self.trainer.train(groups, step)
        except Refused:
            self._give_memory_back()  # no version comes of it: the engine wakes with the old one
            raise

    def publish(self, version: int) -> Iterator[Part | Link]:
        """Yield the parts of the current weights, labelled `version`, the link last; collective, only rank 0 yields.

        Raises `LearnerError` instead of the link if a weight is not finite: such a version does not exist.
        """
        from learner.export import finite

        os.environ[VERSION_VARIABLE] = str(version)
        weights = self.trainer.weights()
        checked = finite(version, weights)
        try:
            if self.rank == 0:
                # A part is valid until the next one is asked for; by then Ray has put it into the object store.
                yield from self._sender.send(version, checked)
            else:
                for _ in checked:
                    pass
        finally:
            # A generator whose part finds no room Ray closes, before it reports that; the other ranks gather on.
            for _ in weights:
                pass
            self._give_memory_back()

    def _give_memory_back(self) -> None:
        """What torch keeps for the next step, an engine on this GPU needs for its weights and KV until then."""
        if self.spec.shares_device:
            import torch

            torch.cuda.empty_cache()

    def broadcast(self, manifest: WeightManifest, group: NcclGroup) -> None:
        """Send the version published last to the engines of `group`; collective, only rank 0 sends."""
        weights = self.trainer.weights()
        try:
            if self.rank == 0:
                self._joined(group).send(manifest, weights)
        except TransferError:
            self._leave()
            raise
        finally:
            for _ in weights:  # the other ranks gather with this one, whatever became of the transfer
                pass

    def _joined(self, group: NcclGroup) -> NcclSender:
        if self._broadcaster is None or self._broadcaster.group != group:
            self._leave()
            self._broadcaster = NcclSender(group)
        return self._broadcaster

    def _leave(self) -> None:
        if self._broadcaster is not None:
            self._broadcaster.close()
            self._broadcaster = None

    def save(self, directory: str) -> SavedPart:
        """Write this rank's part of the resumable state into `directory`; collective."""
        import ray

        return SavedPart(ray.util.get_node_ip_address(), self.trainer.save(Path(directory)))

    def export(self, directory: str) -> None:
        """Write a Hugging Face checkpoint into `directory`; collective, rank 0 writes."""
        self.trainer.export(Path(directory))

    @property
    def trainer(self) -> Trainer:
        """The started trainer."""
        if self._trainer is None:
            raise LearnerError(f"learner rank {self.rank} was used before start")
        return self._trainer
