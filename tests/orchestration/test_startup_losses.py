"""Actors that die, hang or raise while the pool starts: a killed one is one restart, a mistake ends the run at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError, RuntimeEnvSetupError

from orchestration import pools
from orchestration.failures import DeadlineExceeded, PoolExhausted, RunError
from orchestration.pools import ActorPool
from tests.orchestration.test_pools import task_error

START_S = 0.3
HANGS = "hangs"
SERVES = "serves"
KILLED = ActorDiedError()
OUT_OF_MEMORY = OutOfMemoryError("killed by Ray's memory monitor")
MISTAKE = RuntimeError("CUDA error: invalid device ordinal")
IN_READY = task_error(MISTAKE)
IN_CONSTRUCTOR = ActorDiedError(RayTaskError("RolloutActor.__init__", "traceback: " + str(MISTAKE), MISTAKE))


def starting_actor(fate: BaseException | str) -> Any:
    async def ready() -> dict[str, int]:
        if isinstance(fate, BaseException):
            raise fate
        if fate == HANGS:
            await asyncio.sleep(3600)
        return {"progress": 0}

    return SimpleNamespace(ready=SimpleNamespace(remote=ready), stats=SimpleNamespace(remote=ready))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ActorPool]:
    """Starts a pool of two whose actors have these fates, as they are created; the last is for the rest."""
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(pools, "RESTART_PAUSE_S", 0.0)

    def started(*fates: BaseException | str, restarts: int = 3, node: str | None = "node-1") -> ActorPool:
        monkeypatch.setattr(pools, "node_of", lambda actor: node)
        left = list(fates)

        def create(index: int) -> Any:
            return starting_actor(left.pop(0) if left[1:] else left[0])

        async def start() -> ActorPool:
            pool = ActorPool(create, 2, startup_timeout_s=START_S, hang_timeout_s=5, restarts=restarts)
            try:
                async with asyncio.timeout(5):
                    await pool.start()
                assert all(member.ready for member in pool.members)
                pool.raise_if_broken()
                return pool
            finally:
                pool.kill()

        return asyncio.run(start())

    return started


@pytest.mark.parametrize("death", [KILLED, OUT_OF_MEMORY])
def test_one_that_is_killed_while_it_starts_costs_one_restart(
    death: BaseException, started: Callable[..., ActorPool]
) -> None:
    assert started(SERVES, death, SERVES).counts == {"lost/start": 1, "restarts": 1}


def test_one_that_hangs_while_it_starts_costs_one_restart(started: Callable[..., ActorPool]) -> None:
    assert started(HANGS, SERVES).counts == {"lost/start": 1, "restarts": 1}


def test_actors_that_all_die_end_the_run_with_the_budget(started: Callable[..., ActorPool]) -> None:
    with pytest.raises(
        PoolExhausted, match=r"actor \d was lost \(start-up: ActorDiedError.*raise pipeline.max_restarts"
    ):
        started(KILLED)


@pytest.mark.parametrize("error", [IN_READY, IN_CONSTRUCTOR, RuntimeEnvSetupError(str(MISTAKE))])
@pytest.mark.parametrize("before", [[], [KILLED]])
def test_a_mistake_ends_the_run_at_once_and_is_named(
    error: BaseException, before: Sequence[BaseException], started: Callable[..., ActorPool]
) -> None:
    with pytest.raises(
        RunError, match=r"(?s)a pool actor cannot start: .*CUDA error: invalid device ordinal"
    ) as raised:
        started(SERVES, *before, error, restarts=100)
    assert not isinstance(raised.value, PoolExhausted)


@pytest.mark.parametrize(("node", "replaced"), [(None, {0}), ("node-1", {1, 2})])
def test_a_start_that_would_only_hang_again_ends_the_run(
    node: str | None, replaced: set[int], started: Callable[..., ActorPool], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a place the cluster is too small; with one, a second hang is no accident."""
    with pytest.raises(DeadlineExceeded, match=r"for pool actor \d to start \(is the cluster large enough"):
        started(HANGS, node=node, restarts=100)
    assert caplog.text.count(" lost: ") in replaced


@pytest.mark.parametrize("death", [KILLED, OUT_OF_MEMORY])
def test_one_that_dies_while_others_still_start_is_replaced(
    death: Exception, started: Callable[..., ActorPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves already, and is watched."""
    monkeypatch.setattr(pools, "PING_EVERY_S", 0.01)
    monkeypatch.setattr(ActorPool, "_prepare", _slow_second(death))
    assert started(SERVES).counts == {"lost/ping": 1, "restarts": 1}


def _slow_second(death: Exception) -> Callable[[ActorPool, Any], Awaitable[None]]:
    async def prepare(pool: ActorPool, member: pools.Member) -> None:
        if member.index == 1:
            dies = starting_actor(death)
            pool.members[0].actor.stats = dies.stats
            while not pool.counts["lost/ping"]:
                await asyncio.sleep(0.01)

    return prepare
