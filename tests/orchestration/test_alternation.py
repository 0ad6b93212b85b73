"""Learner and engines on one GPU: who has the memory when. Fakes stand for both; a GPU is not needed to take turns."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from learner.spec import ReplayError
from orchestration import pools
from orchestration.alternation import AlternatingLearner
from orchestration.config import parse_config
from orchestration.rollout_pool import RolloutPool

BASE: dict[str, Any] = {"name": "run", "model": {"path": "m"}, "data": {"train": {"path": "t.jsonl"}}}
SHARED: dict[str, Any] = {"rollout": {"num_gpus": 0.45}, "learner": {"num_gpus": 0.5}, "pipeline": {"max_staleness": 0}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"pipeline": {"max_staleness": 1}}, False),
        ({"learner": {"num_gpus": 1}}, False),
        ({"rollout": {"num_gpus": 0}}, False),
    ],
)
def test_who_takes_turns(change: dict[str, Any], expected: bool) -> None:
    assert parse_config(BASE | SHARED | change, "test").alternates is expected


@dataclass
class FakeSummary:
    num_cut: int = 0
    seconds: float = 1.0


class FakeEngine:
    """An actor with an engine that refuses work while it sleeps, as the real one does."""

    def __init__(self, journal: list[str]) -> None:
        self.asleep = False
        self.journal = journal
        self.release = asyncio.Event()
        for name in ("ready", "stats", "sleep", "wake", "update_weights"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))
        self.generate = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=self._generate))

    async def _ready(self) -> None:
        return None

    async def _stats(self) -> dict[str, int]:
        return {"progress": 0}

    async def _sleep(self) -> None:
        self.journal.append("sleep")
        self.asleep = True

    async def _wake(self) -> None:
        self.journal.append("wake")
        self.asleep = False

    async def _update_weights(self, links: Any, parts: Any) -> dict[str, float]:
        self.journal.append("update")
        self.asleep = False
        return {}

    def _generate(self, requests: Any, so_far: Any) -> tuple[str, Any]:
        async def answer() -> Any:
            assert not self.asleep
            self.journal.append("generate")
            await self.release.wait()
            return FakeSummary()

        return "batch", answer()


class FakeLearner:
    def __init__(self, journal: list[str], error: Exception | None = None) -> None:
        self.journal, self.error = journal, error

    async def train(self, groups: Any, step: int) -> dict[str, float]:
        self.journal.append("train")
        if self.error is not None:
            raise self.error
        return {}


def version(number: int) -> Any:
    return SimpleNamespace(manifest=SimpleNamespace(version=number), links=(), shards=())


def test_phases_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running group is waited for, a sleeping engine gets none, a newcomer sleeps too, the next version wakes it."""
    monkeypatch.setattr(pools.ray, "kill", lambda actor: None)
    monkeypatch.setattr(pools, "RESTART_PAUSE_S", 0.0)

    async def run() -> None:
        journal: list[str] = []
        engines = [FakeEngine(journal) for _ in range(3)]
        pool = make_pool(lambda index: engines.pop(0))
        learner: Any = AlternatingLearner(FakeLearner(journal), pool)  # type: ignore[arg-type]
        await pool.start()
        first = pool.members[0].actor
        room = pool.reserve(1, lambda version: True)
        assert room is not None
        running = asyncio.create_task(pool.generate(room, [SimpleNamespace(request_id="r", group_id="g")]))  # type: ignore[list-item]
        training = asyncio.create_task(learner.train([], 0))
        await settle()
        assert journal == ["generate"], "the learner waits for the group"
        assert pool.reserve(1, lambda version: True) is None, "and no other is begun"
        first.release.set()
        await running
        await training
        assert journal == ["generate", "sleep", "train"]
        assert pool.reserve(1, lambda version: True) is None
        pool.lose(pool.members[0], "killed", "died")
        await settle()
        assert pool.members[0].actor.asleep, "its replacement finds the device taken"
        await pool.publish(version(1))
        await settle()
        assert journal[3:] == ["sleep", "update"]
        served = pool.reserve(1, lambda version: version == 1)
        assert served is not None
        served.release()
        await pool.sleep()
        await pool.wake()
        assert journal[5:] == ["sleep", "wake"]
        assert pool.reserve(1, lambda version: version == 1) is not None
        pool.raise_if_broken()
        pool.kill()

    asyncio.run(run())


def test_a_step_that_is_refused_wakes_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """No version follows that would wake them: without it the run would wait for ever."""
    monkeypatch.setattr(pools.ray, "kill", lambda actor: None)

    async def run() -> None:
        journal: list[str] = []
        pool = make_pool(lambda index: FakeEngine(journal))
        learner: Any = AlternatingLearner(FakeLearner(journal, ReplayError("none left")), pool)  # type: ignore[arg-type]
        await pool.start()
        with pytest.raises(ReplayError):
            await learner.train([], 0)
        assert journal == ["sleep", "train", "wake"]
        assert pool.reserve(1, lambda version: True) is not None
        pool.kill()

    asyncio.run(run())


def make_pool(create: Any) -> RolloutPool:
    return RolloutPool(
        create,
        1,
        request_timeout_s=5,
        sync_timeout_s=5,
        max_in_flight=8,
        startup_timeout_s=5,
        hang_timeout_s=5,
        restarts=2,
    )


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0.002)
