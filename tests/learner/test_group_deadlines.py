"""What the driver says where ranks take too long, die or write where it cannot see, without ranks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from learner import saved
from learner.group import LearnerGroup
from learner.saved import SavedPart
from learner.spec import CheckpointNotWritten, LearnerError, LearnerSpec


class FakeGroup(LearnerGroup):
    """Ranks that answer as told."""

    def __init__(self, *ranks: Callable[..., Awaitable[Any]], **spec: Any) -> None:
        super().__init__(LearnerSpec(model_path="unused", total_steps=1, world_size=len(ranks), **spec), {})
        self.answers = ranks

    async def _place_ranks(self, deadline: float) -> tuple[str, int]:
        self._ranks = [
            SimpleNamespace(start=SimpleNamespace(remote=answer), save=SimpleNamespace(remote=answer))
            for answer in self.answers
        ]
        return "localhost", 1

    def kill(self) -> None:
        self._ranks = []


async def ready(*_: Any) -> dict[str, int]:
    return {"pid": 1}


async def never(*_: Any) -> None:
    await asyncio.sleep(60)


async def timed_out(*_: Any) -> None:
    await asyncio.sleep(0.3)
    raise RuntimeError("Timed out waiting 600000ms for recv operation to complete")


async def broken(*_: Any) -> None:
    raise RuntimeError("no such model")


@pytest.mark.parametrize(
    ("rank", "checkpoint", "words"),
    [
        (
            never,
            None,
            "killed; raise learner.startup_timeout_s=0.5 and learner.collective_timeout_s=0.2 if it needs longer: all",
        ),
        (
            never,
            Path("step_3/learner"),
            "learner.startup_timeout_s=0.5 and learner.collective_timeout_s=0.2 if it needs",
        ),
        (timed_out, None, "all wait for the last to load the model"),
        (timed_out, Path("step_3/learner"), "step_3/learner was saved by another number of ranks than 2"),
    ],
)
def test_a_start_that_takes_too_long_names_the_keys(
    rank: Callable[..., Awaitable[Any]], checkpoint: Path | None, words: str
) -> None:
    group = FakeGroup(ready, rank, startup_timeout_s=0.5, collective_timeout_s=0.2)
    with pytest.raises(LearnerError) as error:
        asyncio.run(group.start(checkpoint))
    assert "generation 1, phase start: " in str(error.value)
    assert words in str(error.value)


def test_a_start_that_fails_at_once_does_not(tmp_path: Path) -> None:
    with pytest.raises(LearnerError) as error:
        asyncio.run(FakeGroup(broken).start(tmp_path))
    assert str(error.value).endswith("no such model; all ranks were killed")


def test_a_state_on_a_disk_of_its_own_node_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "VISIBLE_S", 0.1)
    monkeypatch.setattr(saved, "POLL_S", 0.02)

    async def save(directory: str) -> SavedPart:
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "here" / "a.pt").write_bytes(b"abc")
        return SavedPart("10.0.0.2", {"a.pt": 3})

    async def scenario() -> None:
        group = FakeGroup(save)
        await group._place_ranks(0)
        await group.save(tmp_path / "here")
        with pytest.raises(
            CheckpointNotWritten, match=r"there/a\.pt: learner rank 0 on node 10\.0\.0\.2 wrote 3 bytes"
        ):
            await group.save(tmp_path / "there")
        assert group.alive, "it may well go on"

    asyncio.run(scenario())


OUT_OF_MEMORY = OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node was 99 %")


@pytest.mark.parametrize(
    ("death", "words"),
    [
        (RayActorError(), "rank 1 died"),
        (OUT_OF_MEMORY, "rank 1 died of OutOfMemoryError: Task was killed due to the node running low on memory."),
    ],
)
def test_a_death_is_the_cause_and_its_echo_is_not(death: RayError, words: str) -> None:
    async def dies(*_: Any) -> None:
        await asyncio.sleep(0.1)
        raise death

    group = FakeGroup(broken, dies)
    with pytest.raises(LearnerError) as error:
        asyncio.run(group.start(None))
    assert error.value.__cause__ is death
    assert f"rank 0 raised RuntimeError: no such model; {words}; all" in str(error.value)


@pytest.mark.parametrize(("error", "tries"), [(OUT_OF_MEMORY, 2), (RayActorError(), 2), (RuntimeError("bug"), 1)])
def test_a_rank_that_dies_where_it_was_sent_is_sent_again(
    error: Exception, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a generation has run: its node may be lost. What a rank raises itself it would raise again."""
    made: list[int] = []

    async def rendezvous() -> tuple[str, int]:
        if len(made) == 1:
            raise error
        return "localhost", 1

    def make(spec: LearnerSpec, rank: int) -> Any:
        made.append(rank)
        return SimpleNamespace(rendezvous=SimpleNamespace(remote=rendezvous))

    actor_class = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))
    monkeypatch.setattr("ray.remote", lambda _: actor_class)
    monkeypatch.setattr("ray.kill", lambda _: None)
    monkeypatch.setattr("learner.group.PLACE_POLL_S", 0.01)

    async def scenario() -> None:
        group = LearnerGroup(LearnerSpec(model_path="unused", total_steps=1), {})
        group.generation = 2
        deadline = time.monotonic() + 60
        if tries == 1:
            with pytest.raises(LearnerError, match="bug"):
                await group._place_ranks(deadline)
        else:
            assert await group._place_ranks(deadline) == ("localhost", 1)
        assert len(made) == tries

    asyncio.run(scenario())
