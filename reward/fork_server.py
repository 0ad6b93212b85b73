"""The small process that children are forked from: SymPy and math-verify imported once, no threads, no secrets.

It starts children, kills their process groups and reaps them, so a pid is never reused while the verifier knows it.
It runs no answer itself and ends when its control socket closes, however the verifier ended; the kernel then kills
its children.

    verifier --spawn + socket (SCM_RIGHTS)--> fork server --fork--> child <--frames--> verifier
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from reward import child, confinement

MAX_CONTROL_BYTES = 4096
_REAP_EVERY_S = 0.05
_DYING_S = 1.0
_GARBAGE_THRESHOLD = 50_000
"""Objects between collections in children: parsing drops so many that the default costs a fifth of the time."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Plain data that the verifier passes as JSON."""

    memory_mb: int
    deadline_s: float
    user_rule: str | None = None
    use_namespaces: bool = True
    """Where the kernel allows them; False leaves programs to the system-call filter alone."""


def main(control_fd: int, options: ServerOptions) -> None:
    """Serve until the control socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child.import_graders()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE_THRESHOLD)
    confinement.adopt_orphans()
    control = socket.socket(fileno=control_fd)
    options = dataclasses.replace(options, use_namespaces=options.use_namespaces and _has_namespaces())
    control.sendall(json.dumps({"namespaces": options.use_namespaces}).encode())
    children: set[int] = set()
    zombies: set[int] = set()
    while True:
        readable, _, _ = select.select([control], [], [], _REAP_EVERY_S if zombies else None)
        zombies -= {pid for pid in zombies if _reaped(pid)}
        if not readable:
            continue
        data, descriptors, _, _ = socket.recv_fds(control, MAX_CONTROL_BYTES, 1)
        if not data:
            break
        request: dict[str, Any] = json.loads(data)
        if request["op"] == "spawn":
            pid = _spawn(control, descriptors[0], options, confined=request["confined"])
            children.add(pid)
            control.sendall(json.dumps({"pid": pid}).encode())
        elif request["op"] == "kill":
            _kill_group(request["pid"])
            children.discard(request["pid"])
            zombies.add(request["pid"])
        elif request["op"] == "wait":
            children.discard(request["pid"])
            zombies.add(request["pid"])
            control.sendall(json.dumps({"status": _final_status(request["pid"])}).encode())
    for pid in children:
        _kill_group(pid)


def _has_namespaces() -> bool:
    """Whether programs can get namespaces of their own here; tried out in a process that ends at once."""
    pid = os.fork()
    if pid == 0:
        allowed = False
        try:
            allowed = confinement.enter_namespaces()
        finally:
            os._exit(0 if allowed else 1)
    return os.waitpid(pid, 0)[1] == 0


def _spawn(control: socket.socket, descriptor: int, options: ServerOptions, *, confined: bool) -> int:
    server_pid = os.getpid()
    pid = os.fork()
    if pid:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # the child does the same; whoever comes second may be refused
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        confinement.die_with_parent(server_pid)
        control.close()
        confinement.close_all_files({descriptor})
        limits = confinement.Limits(options.memory_mb, options.deadline_s)
        isolate = confined and options.use_namespaces
        connection = socket.socket(fileno=descriptor)
        child.run(connection, limits, options.user_rule, confined=confined, isolate=isolate)
    finally:
        os._exit(70)


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _reaped(pid: int) -> bool:
    """Whether nothing of a killed group is left: what the child started becomes ours when the child goes."""
    try:
        while os.waitpid(-pid, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def _final_status(pid: int) -> int:
    """How a child that closed its socket ended; one that lingers is killed."""
    deadline = time.monotonic() + _DYING_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _kill_group(pid)
            return status
        time.sleep(0.002)
    _kill_group(pid)
    return os.waitpid(pid, 0)[1]


def start(control_fd: int, argument: str) -> None:
    """Entry point of the interpreter that the verifier starts: `argument` is the JSON of `ServerOptions`."""
    main(control_fd, ServerOptions(**json.loads(argument)))
    sys.exit(0)
