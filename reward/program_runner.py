"""The process that a model's programs are forked from, and those programs.

    verifier --gold--> grader --program, input--> runner --fork--> program
                       grader <------ output ---- runner <--pipe--

The runner is forked before its grader reads a gold value and is told one program and one input at a time: neither a
program nor any process that it was forked from ever held an expected output. Every run is a process of its own behind
a system-call filter: no network, no further processes, no writes, no signals.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import types
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, NoReturn

from reward import confinement, landlock, seccomp
from reward.verdict import Verdict

_MAX_MESSAGE_CHARS = 500
_MAX_NOTE_BYTES = 4096
"""What the smallest pipe takes without a reader."""
_FAILED, _NO_MEMORY, _NOT_CONFINED = 81, 82, 83


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a program."""

    source: str
    kind: Literal["script", "function", "asserts"]
    """What its output is: what it prints, the JSON of what `function` returns, or `given` if it comes to its end."""
    max_output_bytes: int
    given: str = ""
    """Standard input; of a function its arguments, JSON, one per line."""
    function: str = ""


class Runner:
    """The grader's handle on the process. To be made before the grader knows what a program must not."""

    def __init__(self, limits: confinement.Limits) -> None:
        self._connection, remote = multiprocessing.Pipe()
        grader_pid = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                confinement.die_with_parent(grader_pid)
                confinement.close_all_files({remote.fileno()})
                _serve(remote, limits)
            finally:
                os._exit(70)
        remote.close()

    def run(self, run: Run) -> tuple[Verdict, str]:
        """The output where the program ended well (CORRECT, as far as this process knows), otherwise how it failed."""
        self._connection.send_bytes(json.dumps(asdict(run)).encode())
        verdict, text = json.loads(self._connection.recv_bytes())
        return Verdict(verdict), text

    def close(self) -> None:
        """End it."""
        self._connection.close()
        os.waitpid(self._pid, 0)


def _serve(connection: Connection, limits: confinement.Limits) -> None:
    while True:
        try:
            run = Run(**json.loads(connection.recv_bytes()))
        except EOFError:
            return
        confinement.limit_cpu(limits)
        connection.send_bytes(json.dumps(_run_process(run)).encode())


def _run_process(run: Run) -> tuple[Verdict, str]:
    """Run a program in a filtered process: its output, or how it failed."""
    reader, writer = os.pipe()
    note_reader, note_writer = os.pipe()
    standard_input = os.memfd_create("input")
    os.write(standard_input, run.given.encode(errors="surrogatepass"))
    os.lseek(standard_input, 0, os.SEEK_SET)
    runner_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become_program(run, runner_pid, standard_input, writer, note_writer)
    for descriptor in (writer, note_writer, standard_input):
        os.close(descriptor)
    output = _read_until_closed(reader, pid, run.max_output_bytes)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(note_reader, "rb") as file:
        note = file.read(_MAX_NOTE_BYTES).decode(errors="replace")
    if output is None:
        return Verdict.INCORRECT, f"more than {run.max_output_bytes} bytes of output"
    return (Verdict.CORRECT, output.decode(errors="replace")) if status == 0 else _failure(status, note)


def _failure(status: int, note: str) -> tuple[Verdict, str]:
    if status == _FAILED:
        return Verdict.INCORRECT, note
    if status == _NOT_CONFINED:
        return Verdict.CRASH, f"the program could not be confined and was not run: {note}"
    if status == _NO_MEMORY:
        return Verdict.OUT_OF_MEMORY, "the memory limit was met"
    if status == -signal.SIGXCPU:
        return Verdict.TIMEOUT, "the CPU limit was met"
    if status < 0:
        return Verdict.CRASH, f"killed by {signal.Signals(-status).name}"
    return Verdict.INCORRECT, f"exit status {status}"


def _read_until_closed(reader: int, pid: int, max_bytes: int) -> bytes | None:
    """All that a program writes; None, and its end, where that is more than it may."""
    output = bytearray()
    with open(reader, "rb", buffering=0) as pipe:
        while True:
            data = pipe.read(1 << 16)
            if not data:
                return bytes(output)
            output += data
            if len(output) > max_bytes:
                os.kill(pid, signal.SIGKILL)
                return None


def _become_program(run: Run, runner_pid: int, standard_input: int, writer: int, note_writer: int) -> NoReturn:
    """In the forked process: give up everything, run, leave. Nothing of ours runs after this."""
    code = _NOT_CONFINED
    note = ""
    try:
        confinement.die_with_parent(runner_pid)
        os.dup2(standard_input, 0)
        if run.kind == "script":
            writer = os.dup2(writer, 1)
        confinement.close_all_files({0, writer, note_writer})
        _open_standard_streams()
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        confinement.drop_capabilities()
        if landlock.is_supported():
            landlock.restrict(landlock.readable_paths())
        seccomp.install()
        code = _FAILED
        _work(run, writer)
        code = 0
    except MemoryError:
        code = _NO_MEMORY
    except BaseException as error:  # whatever a program raises, SystemExit included, is its result
        note = one_line(error)
    finally:
        with contextlib.suppress(OSError):  # a program may close what it does not know
            os.write(note_writer, note.encode(errors="replace")[:_MAX_NOTE_BYTES])
        os._exit(code)


def _open_standard_streams() -> None:
    """As Python opens them: buffered, and with descriptors that programs may use directly."""
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = open(descriptor, mode, encoding="utf-8", errors="replace")  # noqa: SIM115
        vars(sys).update({name: stream, f"__{name}__": stream})


def _work(run: Run, writer: int) -> None:
    if run.kind == "script":
        _run_script(run.source)
        return
    module = _execute(run.source, "answer")
    result = run.given if run.kind == "asserts" else _call(module, run)
    with open(writer, "wb") as file:
        file.write(result.encode())


def _run_script(source: str) -> None:
    """As `python file` would: threads are joined and exit handlers run before the output counts."""
    sys.argv = ["answer.py"]
    atexit._clear()  # those of the processes that we were forked from
    try:
        _execute(source, "__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None:
            with contextlib.suppress(ValueError):  # closed or detached
                stream.flush()


def _call(module: Any, run: Run) -> str:
    owner = module.Solution() if hasattr(module, "Solution") else module
    arguments = [json.loads(line) for line in run.given.split("\n") if line.strip()]
    return json.dumps(getattr(owner, run.function)(*arguments))


def _execute(source: str, name: str) -> Any:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, "<answer>", "exec", dont_inherit=True), module.__dict__)
    return module


def one_line(error: BaseException) -> str:
    """An exception for the detail of a verdict."""
    message = "".join(character for character in str(error) if character.isprintable())
    return f"{type(error).__name__}: {message[:_MAX_MESSAGE_CHARS]}"
