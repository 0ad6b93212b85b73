"""Draining nodes: who is told, once, with the time that is left; and that Ray still tells us."""

from __future__ import annotations

import asyncio

from orchestration.draining import DrainWatcher, Resident


def test_every_resident_of_a_draining_node_is_told_once() -> None:
    told: list[tuple[str, float]] = []
    residents = [
        Resident(name, node, lambda seconds, name=name: told.append((name, seconds)))  # type: ignore[misc]
        for name, node in (("rollout 0", "a"), ("rollout 1", "b"), ("learner rank 0", "b"))
    ]
    watcher = DrainWatcher(lambda: residents)
    watcher.look({})
    watcher.look({"b": 20.0})
    watcher.look({"b": 17.0})
    assert told == [("rollout 1", 20.0), ("learner rank 0", 20.0)]
    assert watcher.num_drained == 2


def test_a_replacement_on_another_draining_node_is_told_too() -> None:
    told: list[str] = []
    nodes = ["a"]
    watcher = DrainWatcher(lambda: [Resident("rollout 0", nodes[0], lambda seconds: told.append(nodes[0]))])
    watcher.look({"a": 20.0, "b": 20.0})
    nodes[0] = "b"
    watcher.look({"a": 20.0, "b": 20.0})
    assert told == ["a", "b"]


def test_a_drain_is_noticed_within_a_poll() -> None:
    told = asyncio.Event()
    states = iter([{}, {}, {"a": 5.0}])

    async def run() -> None:
        watcher = DrainWatcher(
            lambda: [Resident("driver", "a", lambda seconds: told.set())],
            draining=lambda: next(states, {"a": 5.0}),
            poll_s=0.01,
        )
        task = asyncio.create_task(watcher.watch())
        async with asyncio.timeout(5):
            await told.wait()
        task.cancel()

    asyncio.run(run())
