"""Running a model's program against tests, in the style of HumanEval, MBPP and LiveCodeBench.

Runs inside a confined child. Every run is a process of its own behind a system-call filter: no network, no further
processes, no writes, no signals. Where the tests are inputs and outputs, the comparison happens outside of that
process. Assert-style tests run in the program's own interpreter, as in every such harness: leaving early does not
pass them, but a program that searches the interpreter for its harness could forge a pass.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import secrets
import select
import signal
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

from reward import confinement, landlock, seccomp
from reward.verdict import Verdict

MAX_PROGRAM_CHARS = 64_000
MAX_OUTPUT_BYTES = 1 << 20
_MAX_MESSAGE_CHARS = 500
_FENCE = "```"


class TestsError(ValueError):
    """A gold value that holds no tests."""

    __test__ = False


@dataclass(frozen=True, slots=True)
class ProgramTests:
    """What a program is tried on: asserts, or inputs with their outputs."""

    asserts: str = ""
    """Python that raises unless the program is right."""
    entry_point: str | None = None
    preamble: str = ""
    """Imports that the tests rely on."""
    prompt: str = ""
    """Put in front of a program that only continues it (it does not define the entry point itself)."""
    cases: tuple[tuple[str, str], ...] = ()
    """(standard input, expected output); with `entry_point`: (JSON arguments, one per line, JSON result)."""


def read_tests(gold: str | dict[str, Any]) -> ProgramTests:
    """The tests of a gold value: HumanEval {test, entry_point}, MBPP {test_list, test_import}, or inputs and outputs
    {inputs, outputs[, fn_name]} / {test_cases: [{input, output}][, fn_name]}; an object or its JSON.

    Raises `TestsError` where it is none of these.
    """
    if isinstance(gold, str):
        try:
            gold = json.loads(gold)
        except ValueError as error:
            raise TestsError(f"the gold value of a code task is not JSON: {error}") from error
    if not isinstance(gold, dict):
        raise TestsError(f"the gold value of a code task is a {type(gold).__name__}, not an object with tests")
    if gold.get("test") and gold.get("entry_point"):
        call = f"\ncheck({gold['entry_point']})\n"
        return ProgramTests(gold["test"] + call, gold["entry_point"], prompt=gold.get("prompt") or "")
    if gold.get("test_list"):
        return ProgramTests("\n".join(gold["test_list"]), preamble="\n".join(gold.get("test_import") or ()))
    if gold.get("test_cases"):
        cases = tuple((case["input"], case["output"]) for case in gold["test_cases"])
        return ProgramTests(cases=cases, entry_point=gold.get("fn_name"))
    if gold.get("inputs") and len(gold["inputs"]) == len(gold.get("outputs") or ()):
        cases = tuple(zip(gold["inputs"], gold["outputs"], strict=True))
        return ProgramTests(cases=cases, entry_point=gold.get("fn_name"))
    raise TestsError(
        f"the gold value of a code task has keys {sorted(gold)}; expected test and entry_point, test_list, "
        "test_cases, or inputs and outputs of one length"
    )


def extract_program(text: str) -> str | None:
    """The last fenced block, or the whole text where nothing is fenced; None if that is empty."""
    parts = text.split(_FENCE)
    if len(parts) < 3:
        return text.strip("\n") or None if len(parts) == 1 else None
    block = parts[-2] if len(parts) % 2 else parts[-3]
    first, newline, rest = block.partition("\n")
    program = rest if newline and re.fullmatch(r"\s*\w*\s*", first) else block
    return program.strip("\n") or None


def run_tests(program: str, tests: ProgramTests) -> tuple[Verdict, str]:
    """Try a program; the first failure decides. The caller owns the deadline."""
    try:
        compile(program, "<answer>", "exec")
    except (SyntaxError, ValueError) as error:
        if not tests.prompt:
            return Verdict.UNPARSEABLE, _one_line(error)
    if not seccomp.is_supported():
        return Verdict.CRASH, "programs need a kernel with seccomp and an x86-64 or aarch64 machine"
    if not tests.cases:
        return _run_asserts(program, tests)
    for number, (given, expected) in enumerate(tests.cases, 1):
        verdict, detail = _run_case(program, tests.entry_point, given, expected)
        if verdict is not Verdict.CORRECT:
            return verdict, f"case {number} of {len(tests.cases)}: {detail}"
    return Verdict.CORRECT, ""


def _run_asserts(program: str, tests: ProgramTests) -> tuple[Verdict, str]:
    if tests.prompt and tests.entry_point and not re.search(rf"^\s*def\s+{tests.entry_point}\b", program, re.MULTILINE):
        program = tests.prompt + program
    source = "\n".join((tests.preamble, program, tests.asserts))
    passed = secrets.token_bytes(16)

    def work(report: Callable[[bytes], None]) -> None:
        _execute(source, "answer")
        report(passed)

    verdict, output = _run_process(work, "")
    if verdict is Verdict.CORRECT and output != passed:
        return Verdict.INCORRECT, "the program ended before its tests did"
    return verdict, "" if verdict is Verdict.CORRECT else output.decode(errors="replace")


def _run_case(program: str, function: str | None, given: str, expected: str) -> tuple[Verdict, str]:
    def run_script(report: Callable[[bytes], None]) -> None:
        captured = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace", write_through=True)
        sys.stdout = captured
        try:
            _execute(program, "__main__")
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise
        finally:
            report(captured.buffer.getvalue()[:MAX_OUTPUT_BYTES])

    def call_function(report: Callable[[bytes], None]) -> None:
        module = _execute(program, "answer")
        owner = module.Solution() if hasattr(module, "Solution") else module
        arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
        report(json.dumps(getattr(owner, function or "")(*arguments)).encode())

    verdict, output = _run_process(call_function if function else run_script, given)
    text = output.decode(errors="replace")
    if verdict is not Verdict.CORRECT:
        return verdict, text
    equal = _same_json(text, expected) if function else _same_output(text, expected)
    return (Verdict.CORRECT, "") if equal else (Verdict.INCORRECT, f"expected {expected[:80]!r}, got {text[:80]!r}")


def _execute(source: str, name: str) -> Any:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, "<answer>", "exec"), module.__dict__)
    return module


def _run_process(work: Callable[[Callable[[bytes], None]], None], given: str) -> tuple[Verdict, bytes]:
    """Run `work` in a filtered process; what it reported, or how it failed."""
    reader, writer = os.pipe()
    standard_input = os.memfd_create("input")
    os.write(standard_input, given.encode(errors="surrogatepass"))
    os.lseek(standard_input, 0, os.SEEK_SET)
    pid = os.fork()
    if pid == 0:
        _become_program(work, writer, standard_input)
    os.close(writer)
    os.close(standard_input)
    output = _read_until_closed(reader, pid)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0:
        return Verdict.CORRECT, output
    if status == _FAILED:
        return Verdict.INCORRECT, output
    if status == _NOT_CONFINED:
        return Verdict.CRASH, b"the program could not be confined and was not run: " + output
    if status == _NO_MEMORY:
        return Verdict.OUT_OF_MEMORY, b"the memory limit was met"
    if status == -signal.SIGXCPU:
        return Verdict.TIMEOUT, b"the CPU limit was met"
    if status < 0:
        return Verdict.CRASH, f"killed by {signal.Signals(-status).name}".encode()
    return Verdict.INCORRECT, f"exit status {status}".encode()


_FAILED, _NO_MEMORY, _NOT_CONFINED = 81, 82, 83


def _become_program(work: Callable[[Callable[[bytes], None]], None], writer: int, standard_input: int) -> NoReturn:
    """In the forked process: give up everything, run, leave. Nothing of ours runs after this."""
    code = _NOT_CONFINED
    messages: list[bytes] = []
    try:
        os.dup2(standard_input, 0)
        confinement.close_all_files({0, writer})
        sys.stdin = io.TextIOWrapper(io.FileIO(0), encoding="utf-8", errors="replace")
        sys.stdout = sys.stderr = io.StringIO()
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        confinement.drop_capabilities()
        if landlock.is_supported():
            landlock.restrict(landlock.readable_paths())
        seccomp.install()
        code = _FAILED
        work(messages.append)
        code = 0
    except MemoryError:
        code = _NO_MEMORY
    except BaseException as error:  # whatever a program raises, SystemExit included, is its result
        messages = [_one_line(error).encode(errors="replace")]
    finally:
        for message in messages:
            os.write(writer, message)
        os._exit(code)


def _read_until_closed(reader: int, pid: int) -> bytes:
    output = bytearray()
    while True:
        select.select([reader], [], [])
        data = os.read(reader, 1 << 16)
        output += data
        if len(output) > MAX_OUTPUT_BYTES:
            os.kill(pid, signal.SIGKILL)
        if not data:
            os.close(reader)
            return bytes(output)


def _same_json(text: str, expected: str) -> bool:
    try:
        return bool(json.loads(text) == json.loads(expected))
    except ValueError:
        return text.strip() == expected.strip()


def _same_output(text: str, expected: str) -> bool:
    """Line by line, ignoring spacing; numbers by value."""
    lines = [line.split() for line in text.strip().splitlines()]
    wanted = [line.split() for line in expected.strip().splitlines()]
    if lines == wanted:
        return True
    if [len(line) for line in lines] != [len(line) for line in wanted]:
        return False
    pairs = ((a, b) for line, want in zip(lines, wanted, strict=True) for a, b in zip(line, want, strict=True))
    return all(a == b or _same_number(a, b) for a, b in pairs)


def _same_number(text: str, expected: str) -> bool:
    try:
        return Decimal(text) == Decimal(expected)
    except InvalidOperation:
        return False


def _one_line(error: BaseException) -> str:
    message = "".join(character for character in str(error) if character.isprintable())
    return f"{type(error).__name__}: {message[:_MAX_MESSAGE_CHARS]}"
