"""A pool of warm, killable grader processes; the wall-clock deadline belongs to the parent.

    submit(job) -> Future          one dispatcher thread, a short line of jobs per child
       queue --> idle child --frame--> reply --> Future
                      |-- deadline passed: Future = timeout, SIGKILL to the process group, a new fork (milliseconds)
                      |-- died:            Future = crash (signal or exit status), a new fork
                      `-- slow while others wait: a substitute beside it, and lower priority if it burns CPU

Invariants: every job's future is resolved exactly once, at most `deadline_s` (plus scheduling) after a child began it,
or twice that where the machine gave the child no CPU; a job behind one that hangs or dies goes to another child; a
child serves at most `recycle_after` jobs; confined jobs (model-written programs) never share a process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from reward import landlock, seccomp
from reward.children import STARVED_CPU_S, STARVED_SHARE, Child, ForkServer, ServerDiedError
from reward.confinement import Limits
from reward.fork_server import ServerOptions
from reward.verdict import Verdict
from reward.wire import Message, WireError, encode

logger = logging.getLogger(__name__)

LINE_LENGTH = 4
"""Jobs handed to one child at a time, so that it does not idle while a busy machine schedules the dispatcher."""
MAX_SLOW = 6
"""Slow children with substitutes, per pool; each may use the whole memory limit."""
MAX_SERVER_DEATHS = 5
_CLOSE_TIMEOUT_S = 60.0
_COUNTERS = (
    *("jobs", "jobs_moved", "jobs_starved"),
    *("children_started", "children_killed", "children_died", "server_deaths"),
)


class SandboxError(RuntimeError):
    """The pool cannot grade any more."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request for a child."""

    payload: Message
    confined: bool = False
    """In a process of its own, isolated: for programs written by a model."""
    burns_cpu: bool = False
    """It never sleeps: without a verdict and without CPU it was starved, and is tried a second time.

    Of a confined job the kernel is asked how long it waited for a CPU."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job."""

    verdict: Verdict
    seconds: float
    """From the moment a child began until the verdict."""
    detail: str = ""
    reward: float | None = None
    """Given by a user's rule; otherwise the verdict decides."""


_Waiting = tuple[Job, "Future[Outcome]"]


class Sandbox:
    """Grader children and the thread that watches them; safe to use from several threads."""

    def __init__(
        self,
        limits: Limits,
        *,
        processes: int = 1,
        recycle_after: int = 2000,
        user_rule: str | None = None,
        use_namespaces: bool = True,
    ) -> None:
        options = ServerOptions(limits.memory_mb, limits.deadline_s, user_rule, use_namespaces)
        self._dispatcher = _Dispatcher(limits, processes, recycle_after, options)
        self._dispatcher.start()

    def submit(self, job: Job) -> Future[Outcome]:
        """Queue a job; the future always gets an `Outcome`, or `SandboxError` if the pool is broken or closed."""
        try:  # here, where it concerns nobody else; not kept, as all jobs of a group share a gold value
            encode(job.payload)
        except WireError as error:
            unsent: Future[Outcome] = Future()
            unsent.set_result(Outcome(Verdict.CRASH, 0.0, f"the request cannot be sent to a grader: {error}"))
            return unsent
        return self._dispatcher.submit(job)

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        return self._dispatcher.stats()

    @property
    def isolation(self) -> str:
        """What keeps a model's program in: of `filter+landlock+namespaces` what works here; `none` refuses it."""
        layers = {
            "filter": seccomp.is_supported(),
            "landlock": landlock.is_supported(),
            "namespaces": self._dispatcher.has_namespaces,
        }
        return "+".join(name for name, works in layers.items() if works) if layers["filter"] else "none"

    def close(self) -> None:
        """Kill all children and end the thread."""
        self._dispatcher.close()


class _Dispatcher(threading.Thread):
    def __init__(self, limits: Limits, processes: int, recycle_after: int, options: ServerOptions) -> None:
        super().__init__(name="sandbox-dispatcher", daemon=True)
        self._limits, self._processes, self._recycle_after = limits, processes, recycle_after
        self._options = options
        self._server = ForkServer(self._options)
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        self._lock = threading.Lock()
        self._queue: deque[_Waiting] = deque()
        self._closing = False
        self._broken: str | None = None
        self._idle: list[Child] = []
        self._busy: dict[Child, deque[_Waiting]] = {}
        """The first is being graded, the others wait in the child's socket."""
        self._second_tries: set[Future[Outcome]] = set()
        self._counts = dict.fromkeys(_COUNTERS, 0)

    @property
    def has_namespaces(self) -> bool:
        return self._server.has_namespaces

    def submit(self, job: Job) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        with self._lock:
            if self._closing or self._broken:
                future.set_exception(SandboxError(self._broken or "the sandbox is closed"))
                return future
            self._queue.append((job, future))
        self._wake()
        return future

    def stats(self) -> dict[str, int]:
        return {**self._counts, "children": len(self._idle) + len(self._busy), "server_pid": self._server.pid}

    def close(self) -> None:
        with self._lock:
            self._closing = True
        self._wake()
        self.join(_CLOSE_TIMEOUT_S)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._wake_writer, b"w")

    def run(self) -> None:
        try:
            while not self._closing:
                try:
                    self._step()
                except ServerDiedError as error:
                    self._restart_server(error)
        except Exception as error:  # the thread's boundary: whoever waits for a future must hear of it
            logger.exception("the sandbox dispatcher failed")
            self._broken = f"the sandbox dispatcher failed: {error!r}"
        finally:
            self._shut_down()

    def _step(self) -> None:
        self._hand_out()
        for key, events in self._selector.select(self._next_event_s()):
            if key.data is None:
                os.read(self._wake_reader, 4096)
                continue
            child: Child = key.data
            if events & selectors.EVENT_WRITE:
                child.flush()
                self._watch(child)
            if events & selectors.EVENT_READ:
                self._read(child)
        self._enforce_deadlines()

    def _hand_out(self) -> None:
        """Give queued jobs to children while there is room."""
        while self._queue and (child := self._child_for(self._queue[0][0])):
            job, future = self._queue.popleft()
            if child in self._busy:
                self._busy[child].append((job, future))
            else:
                self._busy[child] = deque([(job, future)])
                child.begin()
            child.send(job.payload)
            self._watch(child)
        while not self._queue and len(self._idle) > self._processes:
            self._discard(self._idle.pop())

    def _child_for(self, job: Job) -> Child | None:
        """An idle child, a new one, or one whose line is short: then it need not wait for this thread in between."""
        slow = sum(child.slow for child in self._busy)
        if len(self._busy) - min(slow, MAX_SLOW) < self._processes:
            return self._idle.pop() if self._idle and not job.confined else self._spawn(job)
        lines = [line for line in self._busy.items() if len(line[1]) < LINE_LENGTH]
        open_lines = [(len(line), child) for child, line in lines if not (child.slow or child.confined or job.confined)]
        return min(open_lines, key=lambda found: found[0])[1] if open_lines else None

    def _spawn(self, job: Job) -> Child:
        child = self._server.spawn(confined=job.confined)
        self._counts["children_started"] += 1
        self._selector.register(child.connection, selectors.EVENT_READ, child)
        return child

    def _watch(self, child: Child) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.has_unsent else 0)
        self._selector.modify(child.connection, events, child)

    def _next_event_s(self) -> float | None:
        """Seconds until a deadline, or until a busy child becomes slow; None if nothing is due."""
        now = time.monotonic()
        due = [child.started + self._limits.deadline_s for child in self._busy]
        due += [child.next_look for child in self._busy if self._others_wait(child)]
        return max(0.0, min(due) - now) if due else None

    def _read(self, child: Child) -> None:
        try:
            replies = child.receive()
        except EOFError:
            self._bury(child)
            return
        except WireError as error:
            self._finish(child, Verdict.CRASH, f"the child answered nonsense: {error}")
            self._discard(child)
            return
        for reply in replies:
            if child not in self._busy:
                return  # an answer to nothing, or to a job that was given to another child
            child.num_answers += 1
            self._finish(child, *_read_reply(reply))
            worn_out = child.num_answers >= self._recycle_after
            if child.confined or child.slow or worn_out or reply.get("retire"):
                self._discard(child)
                return
            if child not in self._busy:
                self._idle.append(child)

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for child in list(self._busy):
            busy_s = now - child.started
            if busy_s >= self._limits.deadline_s:
                self._end_overdue(child)
            elif now >= child.next_look and self._others_wait(child):
                child.look(burns_cpu=self._busy[child][0][0].burns_cpu)
                if child.slow:
                    self._move_line(child)

    def _end_overdue(self, child: Child) -> None:
        """Kill a child at its deadline. Its job has timed out, unless the machine gave it no time to speak of."""
        deadline_s, cpu_s = self._limits.deadline_s, child.cpu_s()
        job, future = self._busy[child][0]
        if job.confined:  # what a program used is not the child's
            starved = child.waited_s() > STARVED_SHARE * deadline_s
        else:
            starved = job.burns_cpu and cpu_s < min(STARVED_CPU_S, 0.1 * deadline_s)
        if starved and future not in self._second_tries:
            self._second_tries.add(future)
            self._counts["jobs_starved"] += 1
            logger.warning(
                "a grader child got %.3f s of CPU, and with what it started waited %.1f s for one, in %g s: "
                "this machine is overloaded",
                cpu_s,
                child.waited_s(),
                deadline_s,
            )
        else:
            used = f" ({cpu_s:.2f} s of CPU)" if job.burns_cpu else ""
            self._finish(child, Verdict.TIMEOUT, f"no verdict within {deadline_s:g} s{used}; killed")
        self._discard(child)

    def _others_wait(self, child: Child) -> bool:
        return bool(self._queue) or len(self._busy[child]) > 1

    def _finish(
        self,
        child: Child,
        verdict: Verdict,
        detail: str = "",
        reward: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Resolve the job at the head of a child's line."""
        line = self._busy[child]
        _, future = line.popleft()
        self._second_tries.discard(future)
        spent_s = time.monotonic() - child.started if seconds is None else seconds
        if line:
            child.begin()
        else:
            del self._busy[child]
        self._counts["jobs"] += 1
        future.set_result(Outcome(verdict, spent_s, detail, reward))

    def _move_line(self, child: Child) -> None:
        """Put the jobs behind the head of a child's line back at the head of the queue."""
        line = self._busy.get(child, deque())
        self._counts["jobs_moved"] += max(0, len(line) - 1)
        with self._lock:
            while len(line) > 1:
                self._queue.appendleft(line.pop())

    def _bury(self, child: Child) -> None:
        """A child that closed its connection: tell why, if somebody waited."""
        self._selector.unregister(child.connection)
        self._counts["children_died"] += 1
        ending = self._server.final_status(child)
        if child in self._busy:
            verdict = Verdict.TIMEOUT if ending == "SIGXCPU" else Verdict.CRASH
            self._finish(child, verdict, f"the grader process ended with {ending}")
            self._give_back(child)
        else:
            self._idle.remove(child)

    def _discard(self, child: Child) -> None:
        """Kill a child whose current job is resolved; those behind it go back to the queue."""
        self._give_back(child)
        self._selector.unregister(child.connection)
        self._counts["children_killed"] += 1
        self._server.kill(child)

    def _give_back(self, child: Child) -> None:
        line = self._busy.pop(child, deque())
        self._counts["jobs_moved"] += len(line)
        with self._lock:
            self._queue.extendleft(reversed(line))

    def _restart_server(self, error: ServerDiedError) -> None:
        """All children went with the server: their jobs crashed; the queue goes on with a new one."""
        self._counts["server_deaths"] += 1
        logger.warning("verifier fork server lost (%s), %d jobs in flight", error, len(self._busy))
        for child in [*self._busy, *self._idle]:
            if child.connection.fileno() >= 0:
                self._selector.unregister(child.connection)
                child.connection.close()
        for child in list(self._busy):
            self._finish(child, Verdict.CRASH, f"the fork server died: {error}")
            self._give_back(child)
        self._idle.clear()
        self._server.close()
        if self._counts["server_deaths"] >= MAX_SERVER_DEATHS:
            raise SandboxError(f"the fork server died {MAX_SERVER_DEATHS} times; the last time: {error}")
        self._server = ForkServer(self._options)

    def _shut_down(self) -> None:
        with self._lock:
            self._closing = True
            waiting = [future for line in (self._queue, *self._busy.values()) for _, future in line]
            self._queue.clear()
        self._busy.clear()
        self._server.close()
        for future in waiting:
            future.set_exception(SandboxError(self._broken or "the sandbox was closed"))
        self._selector.close()
        os.close(self._wake_reader)


def _read_reply(reply: Message) -> tuple[Verdict, str, float | None, float | None]:
    """(verdict, detail, reward, seconds) of a reply, checked before it is believed."""
    reward: Any = reply.get("reward")
    detail = str(reply.get("detail", ""))
    try:
        verdict = Verdict(str(reply["verdict"]))
        return verdict, detail, None if reward is None else float(reward), float(reply["seconds"])
    except (KeyError, TypeError, ValueError) as error:
        return Verdict.CRASH, f"the child answered nonsense: {error!r}", None, None
