"""The engine thread and the actor's waits, with a stand-in for the engine: who waits is always told."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout import engine_thread
from rollout.actor import RolloutActor
from rollout.engine import EngineError
from rollout.engine_thread import EngineThread
from rollout.request import RolloutRequest
from rollout.transport import make_sender
from rollout.weights import VERSION_VARIABLE
from tests.rollout.conftest import base_spec
from tests.rollout.stored import stored

DEADLINE_S = 30
SPEC = base_spec(Path("no model"))


class StandIn:
    """An engine that takes requests and never finishes one."""

    stop_ids = ()
    error: BaseException
    """Of whoever adds the request `bad`."""

    def __init__(self, spec: object) -> None:
        self.num_unfinished = 0
        self.version = 0

    def add(self, request: RolloutRequest, *, prefix: object) -> None:
        if request.request_id == "bad":
            raise self.error
        self.num_unfinished += 1

    def load_weights(self, manifest: Any, shards: object) -> None:
        self.version = manifest.version


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(engine_thread, "SoftEngine", StandIn)
    return StandIn


@pytest.mark.parametrize(
    "error", [RuntimeError("device lost"), SystemExit("device lost")], ids=lambda e: type(e).__name__
)
def test_every_request_of_a_command_that_ends_the_engine_is_told(error: BaseException, stand_in: type[StandIn]) -> None:
    stand_in.error = error
    thread = EngineThread(SPEC)
    requests = [RolloutRequest(name, "g", "p", 0, 0, (5,)) for name in ("first", "bad", "last")]
    for _ in range(2):
        futures = thread.generate(requests, {})
        _, open_futures = concurrent.futures.wait(futures, DEADLINE_S)
        assert not open_futures
        for future in futures:
            with pytest.raises(EngineError, match="the engine has failed: device lost"):
                future.result()


def test_a_fetch_has_no_other_deadline_than_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts arrive when every limit that somebody could set here has passed."""
    submit = asyncio.run_coroutine_threadsafe

    def late(work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> concurrent.futures.Future[Any]:
        future = submit(work, loop)
        in_time = future.result

        def result(timeout: float | None = None) -> Any:
            if timeout is not None:
                raise TimeoutError
            return in_time()

        monkeypatch.setattr(future, "result", result)
        return future

    async def update() -> dict[str, float]:
        actor = RolloutActor(SPEC)
        shards, link = stored(make_sender("object_store"), 3, [("weight", torch.ones(4))])
        parts: list[Any] = [asyncio.sleep(0, shard) for shard in shards]
        return await asyncio.wait_for(actor.update_weights([link], parts), DEADLINE_S)

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", late)
    monkeypatch.setenv(VERSION_VARIABLE, "0")  # put back, which the actor of this test does not do
    report = asyncio.run(update())
    assert report["version"] == 3 and report["num_bytes"] == 16
