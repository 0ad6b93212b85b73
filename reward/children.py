"""The verifier's handles on its fork server and on one child."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from reward.confinement import import_path, scrubbed_environment
from reward.fork_server import MAX_CONTROL_BYTES, ServerOptions
from reward.wire import FrameReader, Message, encode

START_TIMEOUT_S = 120.0
CONTROL_TIMEOUT_S = 30.0
PATIENCE_S = 0.1
"""A child busy for longer gets a substitute if others wait: a few bombs must not stop a pool of two."""
_LAST_PATIENCE_S = 2.0
_SLOW_CPU_S = 0.07
_HONEST_CPU_S = 0.1
"""More than the slowest comparison of MATH-500 answers takes."""
STARVED_CPU_S = 0.05
"""An honest comparison takes 3-20 ms: a child that got less than this, or than a tenth of its deadline, hangs in the
scheduler's queue and not in its answer."""
STARVED_SHARE = 0.5
"""Of its deadline: a program of which one run waited for a CPU for longer was not shown to be slow."""
_SLOW_NICENESS = 10
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from reward.fork_server import start; start({fd}, sys.argv[2])"
)


class ServerDiedError(RuntimeError):
    """The fork server is gone; its children are gone with it."""


class ForkServer:
    """The process that children are forked from; used by one thread only."""

    def __init__(self, options: ServerOptions) -> None:
        self._control, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        bootstrap = _BOOTSTRAP.format(fd=remote.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-c", bootstrap, json.dumps(import_path()), json.dumps(asdict(options))],
            env=scrubbed_environment(),
            pass_fds=[remote.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        remote.close()
        self._control.settimeout(START_TIMEOUT_S)
        self.has_namespaces: bool = self._receive()["namespaces"]
        self._control.settimeout(CONTROL_TIMEOUT_S)

    @property
    def pid(self) -> int:
        """Of the server process."""
        return self._process.pid

    def spawn(self, *, confined: bool) -> Child:
        """A new child, ready to be asked."""
        local, remote = socket.socketpair()
        request = json.dumps({"op": "spawn", "confined": confined}).encode()
        try:
            socket.send_fds(self._control, [request], [remote.fileno()])
        except OSError as error:
            local.close()
            raise ServerDiedError(f"the fork server does not take requests: {error}") from error
        finally:
            remote.close()
        local.setblocking(False)
        return Child(self._receive()["pid"], local, confined)

    def kill(self, child: Child) -> None:
        """SIGKILL to the child's process group; reaped later."""
        child.connection.close()
        self._send({"op": "kill", "pid": child.pid})

    def final_status(self, child: Child) -> str:
        """How a child that closed its connection ended, for humans."""
        child.connection.close()
        self._send({"op": "wait", "pid": child.pid})
        status = self._receive()["status"]
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        return f"exit status {os.waitstatus_to_exitcode(status)}"

    def close(self) -> None:
        """End the server and all children."""
        self._control.close()
        try:
            self._process.wait(CONTROL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(CONTROL_TIMEOUT_S)

    def _send(self, request: Message) -> None:
        try:
            self._control.send(json.dumps(request).encode())
        except OSError as error:
            raise ServerDiedError(f"the fork server does not take requests: {error}") from error

    def _receive(self) -> dict[str, Any]:
        try:
            data = self._control.recv(MAX_CONTROL_BYTES)
        except OSError as error:
            raise ServerDiedError(f"the fork server did not answer in {self._control.gettimeout()} s") from error
        if not data:
            raise ServerDiedError("the fork server ended; its error is on the standard error of this process")
        reply: dict[str, Any] = json.loads(data)
        return reply


@dataclass(eq=False)
class Child:
    """A grader process: answers requests in the order in which they were sent."""

    pid: int
    connection: socket.socket
    confined: bool
    num_answers: int = 0
    slow: bool = False
    """Past its patience: a substitute may run beside it."""
    demoted: bool = False
    """Runs at low priority for good."""
    started: float = 0.0
    next_look: float = 0.0
    """When to see again whether it is slow (monotonic clock)."""
    cpu_before_s: float = 0.0
    """CPU that it had used when the request began."""
    _frames: FrameReader = field(default_factory=FrameReader)
    _unsent: deque[memoryview] = field(default_factory=deque)

    def begin(self) -> None:
        """Note that it works on the first request of its line from now on."""
        self.started = time.monotonic()
        self.next_look = self.started + PATIENCE_S
        self.slow = False
        self.cpu_before_s = self._total_cpu_s()

    def send(self, request: Message) -> None:
        """Put a request into its line; call `flush` while `has_unsent`."""
        self._unsent.append(memoryview(encode(request)))
        self.flush()

    @property
    def has_unsent(self) -> bool:
        """Whether part of the request still waits for room in the socket."""
        return bool(self._unsent)

    def flush(self) -> None:
        """Send what the socket takes; a broken connection shows up in `receive`."""
        while self._unsent:
            try:
                sent = self.connection.send(self._unsent[0])
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()
                return
            rest = self._unsent[0][sent:]
            if rest:
                self._unsent[0] = rest
            else:
                self._unsent.popleft()

    def receive(self) -> list[Message]:
        """Replies that are complete now. Raises EOFError when the child is gone."""
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except ConnectionError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        return self._frames.feed(data)

    def look(self, *, burns_cpu: bool) -> None:
        """Called past `next_look` while others wait: is it slow, and should its priority go down?

        By CPU, not by the clock, for a request that never sleeps: on a busy machine an honest answer takes long, a
        substitute would get no more time, and a demoted child would starve.
        """
        now, cpu_s = time.monotonic(), self.cpu_s()
        self.slow = self.slow or not burns_cpu or cpu_s > _SLOW_CPU_S or now - self.started > _LAST_PATIENCE_S
        self.next_look = now + PATIENCE_S
        if not self.demoted and cpu_s > _HONEST_CPU_S:
            self.demoted = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpriority(os.PRIO_PGRP, self.pid, _SLOW_NICENESS)

    def cpu_s(self) -> float:
        """CPU used since `begin`."""
        return self._total_cpu_s() - self.cpu_before_s

    def waited_s(self) -> float:
        """How long it and the processes below it waited for a CPU; 0 where the kernel does not tell.

        Without those that ended: of a program with many inputs, the run in progress.
        """
        family = [self.pid]
        for member in family:  # grows meanwhile
            family += [int(pid) for pid in _read_proc(member, f"task/{member}/children")]
        return sum(int(nanoseconds) for member in family for nanoseconds in _read_proc(member, "schedstat")[1:2]) / 1e9

    def _total_cpu_s(self) -> float:
        """CPU used by the child since its start; 0 once it is gone."""
        try:
            with open(f"/proc/{self.pid}/stat", encoding="ascii", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS


def _read_proc(pid: int, name: str) -> list[str]:
    """The words of a file of a process; none if it is gone, or the kernel has no such file."""
    try:
        with open(f"/proc/{pid}/{name}", encoding="ascii") as file:
            return file.read().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
