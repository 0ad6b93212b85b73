"""The learner's side of a broadcast: ranks stay in step and alive, whatever becomes of the transfer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from learner import actor
from learner.actor import LearnerRank
from learner.group import LearnerGroup
from learner.spec import LearnerError, LearnerSpec
from rollout.nccl_transfer import NcclGroup, TransferError
from rollout.weights import WeightManifest

SPEC = LearnerSpec(model_path="none", total_steps=1, world_size=2, transport="nccl", shard_bytes=64)
GROUP = NcclGroup("10.0.0.1", 29_500, 1, 1, 5.0)
MANIFEST = WeightManifest(1, (), ())


class FakeSender:
    """Takes one tensor and, if told so, fails."""

    made: list[FakeSender]
    error: Exception | None

    def __init__(self, group: NcclGroup) -> None:
        self.group, self.closed = group, False
        type(self).made.append(self)

    def send(self, manifest: WeightManifest, weights: Iterator[Any]) -> None:
        next(weights)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def senders(monkeypatch: pytest.MonkeyPatch) -> type[FakeSender]:
    """What `LearnerRank` makes instead of an NCCL sender."""
    FakeSender.made, FakeSender.error = [], None
    monkeypatch.setattr(actor, "NcclSender", FakeSender)
    return FakeSender


def rank(number: int, gathered: list[str]) -> LearnerRank:
    """A rank whose tensors are gathered with the others one by one."""

    class Trainer:
        def weights(self) -> Iterator[tuple[str, None]]:
            for name in "abc":
                gathered.append(name)
                yield name, None

    made = LearnerRank(SPEC, number)
    made._trainer = Trainer()  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("error", [None, TransferError("aborted")])
def test_every_rank_gathers_every_tensor(error: Exception | None, senders: type[FakeSender]) -> None:
    senders.error = error
    for number in (0, 1):
        gathered: list[str] = []
        learner = rank(number, gathered)
        if error is not None and number == 0:
            with pytest.raises(TransferError):
                learner.broadcast(MANIFEST, GROUP)
        else:
            learner.broadcast(MANIFEST, GROUP)
        assert gathered == ["a", "b", "c"]
    assert len(senders.made) == 1, "only the first rank sends"


def test_a_group_is_joined_once_and_left_for_another_or_after_a_failure(senders: type[FakeSender]) -> None:
    learner = rank(0, [])
    for _ in range(2):
        learner.broadcast(MANIFEST, GROUP)
    assert [sender.closed for sender in senders.made] == [False]
    other = NcclGroup("10.0.0.1", 29_501, 2, 1, 5.0)
    learner.broadcast(MANIFEST, other)
    assert [(sender.group, sender.closed) for sender in senders.made] == [(GROUP, True), (other, False)]
    senders.error = TransferError("aborted")
    with pytest.raises(TransferError):
        learner.broadcast(MANIFEST, other)
    assert senders.made[-1].closed


@pytest.mark.parametrize(
    ("errors", "raised", "alive"),
    [
        ([TransferError("aborted"), None], TransferError, True),
        ([TransferError("aborted"), RuntimeError("gather failed")], LearnerError, False),
    ],
)
def test_a_transfer_that_failed_alone_leaves_the_ranks(
    errors: list[Exception | None], raised: type[Exception], alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "kill", lambda handle: None)

    async def settle() -> None:
        group = LearnerGroup(SPEC, {})
        group._ranks = [object(), object()]
        futures: list[asyncio.Future[None]] = [asyncio.get_running_loop().create_future() for _ in errors]
        for future, error in zip(futures, errors, strict=True):
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
        with pytest.raises(raised):
            await group._settle("broadcast", futures, asyncio.get_running_loop().time() + 1e6)
        assert group.alive is alive

    asyncio.run(settle())
