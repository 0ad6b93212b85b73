"""Inside one child: answer requests one by one until told otherwise, or killed.

A request is a JSON object with a `task`; a reply has `verdict`, `detail`, `seconds`, `reward` (None: 1 if correct,
else 0) and `retire` (this process should not be used again).
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from reward import code_tests, confinement
from reward.extraction import Answer
from reward.math import GoldError, check_gold, compare
from reward.program_runner import Runner
from reward.verdict import Verdict
from reward.wire import FrameReader, Message, encode

Task = Callable[[Message], Message]
MAX_DETAIL_CHARS = 4000
_SUSPICIOUS_SHARE = 0.5
"""Of the memory limit: math-verify swallows MemoryError, so a negative verdict above it is not believed."""


_WARM_UP = (
    r"\frac{3\sqrt{5}}{7}",
    r"x^2-2x+1",
    r"\left(3,\frac{\pi}{2}\right)",
    r"[-1,2)\cup(3,\infty)",
    r"y=2x+0.5",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"\{1,2\}",
    r"50\%",
    r"\text{east}",
    r"3+2i",
)


def import_graders() -> None:
    """Import what children need and fill the parser's and SymPy's caches, in the process that they are forked from."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for text in _WARM_UP:
        compare(f"\\boxed{{{text}}}", f"\\boxed{{{text}+1}}")


def run(
    connection: socket.socket, limits: confinement.Limits, user_rule: str | None, *, confined: bool, isolate: bool
) -> None:
    """Serve one connection in this freshly forked process.

    A confined one runs a single model-written program, in namespaces of its own if `isolate` and the kernel allows it.
    """
    if isolate and confinement.enter_namespaces():
        parent = os.getpid()
        init = os.fork()
        if init:
            connection.close()
            _exit_like(os.waitpid(init, 0)[1])
        # The first process of the new namespaces: its death, and so its parent's, ends all others in there.
        confinement.die_with_parent(0 if os.getppid() == 0 else parent)
        confinement.seal_file_system()
    if confined or user_rule is None:
        os.chdir("/")
    ceiling = confinement.apply_limits(limits, may_write=confined)
    if confined:
        runner = Runner(limits)
        confinement.hide_memory()
        serve(connection, limits, {"code": functools.partial(_program, runner)}, ceiling, once=True)
        runner.close()
    else:
        serve(connection, limits, {**_TASKS, "user": functools.partial(_user, user_rule or "")}, ceiling, once=False)
    os._exit(0)


def serve(
    connection: socket.socket, limits: confinement.Limits, tasks: Mapping[str, Task], ceiling: int, *, once: bool
) -> None:
    """Answer until the verifier closes the connection; `ceiling` is the address-space limit in bytes."""
    frames = FrameReader()
    while data := connection.recv(1 << 16):
        for request in frames.feed(data):
            confinement.limit_cpu(limits)
            began = time.monotonic()
            reply = _answer(request, tasks)
            reply["seconds"] = time.monotonic() - began
            used = confinement.peak_address_space_bytes() - (ceiling - limits.memory_bytes())
            if used > _SUSPICIOUS_SHARE * limits.memory_bytes():
                reply["retire"] = True
                if reply["verdict"] in (Verdict.INCORRECT, Verdict.UNPARSEABLE) and request["task"] == "math":
                    reply["verdict"] = Verdict.OUT_OF_MEMORY
                    reply["detail"] = f"{used >> 20} MB of the limit of {limits.memory_mb} MB were mapped"
            connection.sendall(encode(reply))
            if once:
                return


def _answer(request: Message, tasks: Mapping[str, Task]) -> Message:
    """The reply to one request; the boundary at which every failure becomes a verdict."""
    try:
        return tasks[request["task"]](request)
    except GoldError as error:
        return {"verdict": Verdict.CRASH, "detail": str(error)}
    except MemoryError:
        return {"verdict": Verdict.OUT_OF_MEMORY, "detail": "the memory limit was met", "retire": True}
    except Exception:
        return {"verdict": Verdict.CRASH, "detail": traceback.format_exc()[-MAX_DETAIL_CHARS:], "retire": True}


def _compare(request: Message) -> Message:
    return {"verdict": compare(request["answer"], request["gold"])}


def _check_gold(request: Message) -> Message:
    problem = check_gold(request["gold"])
    return {"verdict": Verdict.INCORRECT if problem else Verdict.CORRECT, "detail": problem or ""}


def _program(runner: Runner, request: Message) -> Message:
    verdict, detail = code_tests.run_tests(request["program"], code_tests.read_tests(request["gold"]), runner)
    return {"verdict": verdict, "detail": detail[-MAX_DETAIL_CHARS:]}


def _user(user_rule: str, request: Message) -> Message:
    reward = load_user_rule(user_rule)(Answer(**request["answer"]), request["gold"])
    value = float(reward)
    if not math.isfinite(value):
        raise ValueError(f"{user_rule} returned {reward!r}; a reward is a finite number")
    return {"verdict": Verdict.CORRECT if value > 0 else Verdict.INCORRECT, "reward": value}


@functools.cache
def load_user_rule(name: str) -> Callable[[Answer, Any], float]:
    """The function `module:function`."""
    module, _, function = name.partition(":")
    rule: Callable[[Answer, Any], float] = getattr(importlib.import_module(module), function)
    return rule


_TASKS: dict[str, Task] = {"math": _compare, "check_gold": _check_gold}


def _exit_like(status: int) -> None:
    """End as the process that we stood in for did."""
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
        signal.pause()
    os._exit(os.waitstatus_to_exitcode(status))
