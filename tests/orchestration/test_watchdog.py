"""The stall watchdog: late waits are reported once with stacks, timely ones never, also while the loop is blocked."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from orchestration import watchdog
from orchestration.watchdog import WaitRegistry, Watchdog, coroutine_stack


def until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def test_a_wait_is_open_only_inside_its_block() -> None:
    registry = WaitRegistry()
    with registry.waiting_for("weights", who="rollout 1", deadline_s=5):
        ((_, wait),) = registry.open_waits()
        assert wait.describe(wait.since + 7) == "rollout 1 waits for weights: 7 s of 5 s"
    assert registry.open_waits() == []
    with pytest.raises(KeyError), registry.waiting_for("x", who="y", deadline_s=1):
        raise KeyError
    assert registry.open_waits() == []


def test_stalls_are_due_after_the_deadline_and_then_ever_more_rarely() -> None:
    registry = WaitRegistry()
    dog = Watchdog(registry=registry)
    with registry.waiting_for("a batch", who="learner", deadline_s=10):
        since = registry.open_waits()[0][1].since
        due = [age for age in range(100) if dog.stalls(since + age)]
    assert due == [11, 23, 47, 95]
    assert dog.stalls(since + 1000) == []


def test_progress_is_expected_only_where_asked_for() -> None:
    now = time.monotonic()
    assert Watchdog(registry=WaitRegistry()).stalls(now + 1e6) == []
    dog = Watchdog(registry=WaitRegistry(), progress_deadline_s=60)
    assert dog.stalls(now + 59) == []
    assert dog.stalls(now + 62)[0].endswith("since the start")
    dog.progress("step 3")
    assert dog.stalls(time.monotonic() + 30) == []
    assert "since step 3" in dog.stalls(time.monotonic() + 61)[0]


def test_a_stall_is_logged_with_waits_tasks_and_threads(caplog: pytest.LogCaptureFixture) -> None:
    registry = WaitRegistry()
    dog = Watchdog(registry=registry, check_every_s=0.02)

    async def inner_wait(event: asyncio.Event) -> None:
        with registry.waiting_for("groups of step 12", who="learner", deadline_s=0.05):
            await event.wait()

    async def run() -> None:
        dog.start(asyncio.get_running_loop())
        event = asyncio.Event()
        task = asyncio.create_task(inner_wait(event), name="train step 12")
        await asyncio.to_thread(until, lambda: dog.num_reports > 0)
        event.set()
        await task

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
        dog.stop()
    report = caplog.records[0].getMessage()
    assert "learner waits for groups of step 12: 0 s of 0 s" in report
    assert "train step 12:" in report
    assert "await event.wait()" in report
    assert "await fut" in report, "the stack must reach what is awaited, not only the outermost frame"
    assert "MainThread:" in report


def test_a_blocked_event_loop_is_reported_too(caplog: pytest.LogCaptureFixture) -> None:
    registry = WaitRegistry()
    dog = Watchdog(registry=registry, check_every_s=0.02)

    async def run() -> None:
        dog.start(asyncio.get_running_loop())
        with registry.waiting_for("nothing at all", who="a bug", deadline_s=0.05):
            until(lambda: dog.num_reports > 0)  # blocks the loop

    asyncio.run(run())
    dog.stop()
    assert "test_a_blocked_event_loop_is_reported_too" in caplog.text


def test_sigusr1_asks_for_a_report(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    dog = Watchdog(registry=WaitRegistry(), check_every_s=0.05)
    try:
        dog.start()
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: "asked by SIGUSR1" in caplog.text)
    finally:
        dog.stop()
        signal.signal(signal.SIGUSR1, before)
    assert dog.num_reports == 0


def test_waits_come_from_any_thread() -> None:
    registry = WaitRegistry()

    def work() -> None:
        for _ in range(300):
            with registry.waiting_for("x", who=threading.current_thread().name, deadline_s=1):
                registry.open_waits()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert registry.open_waits() == []


def test_the_stack_of_a_generator_chain() -> None:
    async def lowest() -> None:
        await asyncio.sleep(3600)

    async def middle() -> None:
        await lowest()

    async def run() -> list[str]:
        task = asyncio.create_task(middle())
        await asyncio.sleep(0)
        names = [frame.name for frame in coroutine_stack(task.get_coro())]
        task.cancel()
        return names

    assert asyncio.run(run())[:3] == ["middle", "lowest", "sleep"]


def test_the_module_has_one_registry() -> None:
    with watchdog.waiting_for("x", who="y", deadline_s=1):
        assert [wait.who for _, wait in watchdog.WAITS.open_waits()] == ["y"]
