"""Two learner ranks in lockstep on Ray, that start over with one spec after another in the same processes."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import ray
import torch
from ray.exceptions import OutOfDiskError

from learner.actor import LearnerRank
from learner.spec import LearnerError, LearnerSpec, Refused, ScoredGroup
from rollout.transport import make_sender

STEPS = 3

Weights = dict[str, torch.Tensor]


class NoRoom:
    """A part that Ray cannot store, as when the object store and the disk that it spills to are full."""

    def __reduce__(self) -> Any:
        raise OutOfDiskError("full")


class PairRank(LearnerRank):
    """A rank that starts over with one spec after another in the same process (imports are most of a start)."""

    def begin(self, spec: LearnerSpec, master: tuple[str, int], checkpoint: str | None = None) -> None:
        """A fresh trainer in the process group of the first call."""
        self.spec = spec
        self.start(master, checkpoint)

    def run(self, groups: list[ScoredGroup]) -> list[dict[str, float]]:
        """`STEPS` training steps from the current version."""
        first = self.trainer.steps
        return [self.trainer.train(groups, version) for version in range(first, first + STEPS)]

    def set_noise_scale(self, scale: float) -> None:
        """Change the objective of this rank only."""
        self.trainer.settings = dataclasses.replace(self.trainer.settings, noise_scale=scale)

    def refusal(self, method: str, *arguments: Any) -> Exception:
        """What the trainer's method raises."""
        try:
            getattr(self.trainer, method)(*arguments)
        except (Refused, LearnerError) as error:
            return error
        raise AssertionError(f"{method} raised nothing")

    def limit_files(self, num_bytes: int) -> None:
        """No file of this process may grow beyond that (-1: as far as the disk allows), as on a full disk."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))

    def fill_store(self) -> None:
        """The first part of the next publication finds no room."""
        sender = make_sender(self.spec.transport, max_shard_bytes=self.spec.shard_bytes)

        def send(version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Any]:
            self._sender = sender
            parts = sender.send(version, tensors)
            next(parts)
            yield NoRoom()
            yield from parts

        self._sender = SimpleNamespace(send=send)  # type: ignore[assignment]

    def weights(self) -> Weights:
        """All weights, on every rank; held together like the tensors of a shard."""
        held = list(self.trainer.weights())
        return {name: weight.clone() for name, weight in held}


class Pair:
    """Two ranks in lockstep."""

    def __init__(self, spec: LearnerSpec) -> None:
        self.ranks = [ray.remote(PairRank).options(num_cpus=1).remote(spec, rank) for rank in range(2)]
        self.master = ray.get(self.ranks[0].rendezvous.remote(), timeout=120)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The results of one collective call."""
        return ray.get([getattr(rank, method).remote(*arguments) for rank in self.ranks], timeout=300)

    def trained(self, spec: LearnerSpec, groups: list[ScoredGroup]) -> tuple[Weights, list[dict[str, float]]]:
        """Weights and metrics of a fresh two-rank run."""
        self.call("begin", dataclasses.replace(spec, world_size=2), self.master)
        metrics = self.call("run", groups)[0]
        first, second = self.call("weights")
        assert all(torch.equal(first[name], second[name]) for name in first)
        return first, metrics

    def kill(self) -> None:
        """End both."""
        for rank in self.ranks:
            ray.kill(rank)
