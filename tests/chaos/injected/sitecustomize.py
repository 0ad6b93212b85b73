"""On PYTHONPATH of a run under test: one Ray worker goes wrong where no signal can make it, when a file orders it.

`$SOFTGRPO_TEST_ORDERS/<pid>` holds the name of a fault: an engine that fails while its actor lives, a death between two
parts of one weight version, on the receiving or on the sending side.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn


def _obey(order: Path) -> None:
    while not order.is_file():
        time.sleep(0.1)
    FAULTS[order.read_text(encoding="utf-8")]()


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def _fail_in_step() -> None:
    from rollout.engine import SoftEngine

    def step(engine: Any) -> NoReturn:
        raise RuntimeError("injected: the engine fails")

    SoftEngine.step = step


def _die_while_fetching() -> None:
    import rollout.actor

    async def gather(part_refs: Any) -> NoReturn:
        await part_refs[0]
        _die()

    rollout.actor._gather = gather


def _die_while_publishing() -> None:
    from rollout.transport import FullSender

    complete = FullSender.send

    def send(sender: Any, version: int, tensors: Any) -> Iterator[Any]:
        yield next(complete(sender, version, tensors))
        _die()

    FullSender.send = send


FAULTS = {
    "fail in step": _fail_in_step,
    "die while fetching": _die_while_fetching,
    "die while publishing": _die_while_publishing,
}

if any(argument.endswith("default_worker.py") for argument in sys.orig_argv):
    place = Path(os.environ["SOFTGRPO_TEST_ORDERS"]) / str(os.getpid())
    threading.Thread(target=_obey, args=(place,), name="injected faults", daemon=True).start()
