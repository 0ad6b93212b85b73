"""Trying a model's program on tests, in the style of HumanEval, MBPP, LiveCodeBench, APPS and TACO.

Runs inside a confined child; programs run in processes of their own (`reward.program_runner`). Where the tests are
inputs and outputs, no process of a program, and none that it was forked from, has an output: it is compared here.
Assert-style tests run in the program's own interpreter, as in every such harness: leaving early does not pass them,
but a program that searches the interpreter for its harness could forge a pass.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from reward import seccomp
from reward.program_runner import Run, Runner, one_line
from reward.verdict import Verdict
from reward.wire import MAX_FRAME_BYTES, WireError, encode

MAX_PROGRAM_CHARS = 64_000
MAX_OUTPUT_BYTES = 1 << 20
"""Of a program, or twice the expected output where that is more."""
_ROOM_FOR_PROGRAM_BYTES = 1 << 20
"""In a request, beside the gold value: a character takes at most 12 bytes there."""
_FENCE = "```"
_MAX_SHOWN_CHARS = 80


class TestsError(ValueError):
    """A gold value that holds no tests, or none that a program could pass."""

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
    perhaps_wrapped: bool = False
    """Every expected result is a list of one: APPS does not tell [result] from a result that is a list."""


def check_tests(gold: str | dict[str, Any]) -> None:
    """Raise `TestsError` for a gold value that no program could pass, or that does not fit into a request."""
    try:
        size = len(encode({"gold": gold}))
    except WireError as error:
        raise TestsError(f"the gold value of a code task cannot be sent to a grader: {error}") from None
    limit = MAX_FRAME_BYTES - _ROOM_FOR_PROGRAM_BYTES
    if size > limit:
        raise TestsError(f"the gold value of a code task takes {size} bytes as JSON, the limit is {limit}")
    read_tests(gold)


def read_tests(gold: str | dict[str, Any]) -> ProgramTests:
    """The tests of a gold value: HumanEval {test, entry_point}, MBPP {test_list, test_import}, or inputs and outputs
    {inputs, outputs[, fn_name]} / {test_cases: [{input, output}][, fn_name]}; an object or its JSON.

    Inputs and outputs are text, or lists of lines (APPS, TACO). With `fn_name` they are JSON, a line per argument
    (LiveCodeBench), or a list of arguments and a result (APPS). Raises `TestsError` where it is none of these.
    """
    if isinstance(gold, str):
        try:
            gold = json.loads(gold)
        except (ValueError, RecursionError) as error:
            raise TestsError(f"the gold value of a code task is not JSON: {error}") from error
    if not isinstance(gold, dict):
        raise TestsError(f"the gold value of a code task is a {type(gold).__name__}, not an object with tests")
    if gold.get("test") and gold.get("entry_point"):
        test, entry_point = _text(gold, "test"), _text(gold, "entry_point")
        return ProgramTests(f"{test}\ncheck({entry_point})\n", entry_point, prompt=_text(gold, "prompt"))
    if gold.get("test_list"):
        return ProgramTests(_lines(gold, "test_list"), preamble=_lines(gold, "test_import"))
    if gold.get("test_cases") or gold.get("inputs"):
        function = _text(gold, "fn_name")
        if function and not function.isidentifier():
            raise TestsError(
                f"fn_name {_shown(function)} of the gold value of a code task is not the name of a function"
            )
        return _read_cases(_pairs(gold), function)
    raise TestsError(
        f"the gold value of a code task has keys {sorted(gold)}; expected test and entry_point, test_list, "
        "test_cases, or inputs and outputs of one length"
    )


def _text(gold: dict[str, Any], key: str) -> str:
    value = gold.get(key) or ""
    if not isinstance(value, str):
        raise TestsError(f"{key} of the gold value of a code task is a {type(value).__name__}; it must be text")
    return value


def _lines(gold: dict[str, Any], key: str) -> str:
    value = gold.get(key) or []
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise TestsError(f"{key} of the gold value of a code task must be a list of lines of Python")
    return "\n".join(value)


def _pairs(gold: dict[str, Any]) -> list[tuple[Any, Any]]:
    if cases := gold.get("test_cases"):
        if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
            raise TestsError("test_cases of the gold value of a code task must be a list of objects")
        for number, case in enumerate(cases, 1):
            if missing := {"input", "output"} - case.keys():
                raise TestsError(f"case {number} of {len(cases)} has no {' and no '.join(sorted(missing))}")
        return [(case["input"], case["output"]) for case in cases]
    inputs, outputs = gold["inputs"], gold.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise TestsError("inputs and outputs of the gold value of a code task must be lists of one length")
    return list(zip(inputs, outputs, strict=True))


def _read_cases(pairs: list[tuple[Any, Any]], function: str) -> ProgramTests:
    read = _function_case if function else _script_case
    cases = []
    for number, (given, expected) in enumerate(pairs, 1):
        try:
            cases.append(read(given, expected))
        except TestsError as error:
            raise TestsError(f"case {number} of {len(pairs)}: {error}") from None
    wrapped = all(
        isinstance(given, list) and isinstance(expected, list) and len(expected) == 1 for given, expected in pairs
    )
    return ProgramTests(cases=tuple(cases), entry_point=function or None, perhaps_wrapped=bool(function) and wrapped)


def _script_case(given: Any, expected: Any) -> tuple[str, str]:
    return _joined("input", given), _joined("output", expected)


def _joined(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(line.removesuffix("\n") for line in value)
    raise TestsError(f"its {name} is {_shown(value)}; it must be text or a list of lines (or fn_name is missing)")


def _function_case(given: Any, expected: Any) -> tuple[str, str]:
    if isinstance(given, list):
        return "\n".join(json.dumps(argument) for argument in given), _canonical(json.dumps(expected))
    if not isinstance(given, str):
        raise TestsError(
            f"its input is {_shown(given)}; with fn_name it must be a list of arguments, or their JSON, one per line"
        )
    for line in given.split("\n"):
        if line.strip():
            _parsed("input", line)
    return given, _canonical(expected if isinstance(expected, str) else json.dumps(expected))


def _canonical(expected: str) -> str:
    """JSON as programs' results are written, so that their sizes compare."""
    value = _parsed("output", expected)
    if value != _parsed("output", expected):
        raise TestsError("its output is NaN, which no result equals")
    return json.dumps(value)


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TestsError(f"its {name} {_shown(text)} is not JSON, as fn_name requires: {error}") from None


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MAX_SHOWN_CHARS else f"{shown[:_MAX_SHOWN_CHARS]}..."


def extract_program(text: str) -> str | None:
    """The last fenced block, or the whole text where nothing is fenced; None if that is empty."""
    parts = text.split(_FENCE)
    if len(parts) < 3:
        return text.strip("\n") or None if len(parts) == 1 else None
    block = parts[-2] if len(parts) % 2 else parts[-3]
    first, newline, rest = block.partition("\n")
    program = rest if newline and re.fullmatch(r"\s*\w*\s*", first) else block
    return program.strip("\n") or None


def run_tests(program: str, tests: ProgramTests, runner: Runner) -> tuple[Verdict, str]:
    """Try a program; the first failure decides. The caller owns the deadline."""
    try:
        compile(program, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        if not tests.prompt:
            return Verdict.UNPARSEABLE, one_line(error)
    if not seccomp.is_supported():
        return Verdict.CRASH, "programs need a kernel with seccomp and an x86-64 or aarch64 machine"
    if not tests.cases:
        return _run_asserts(program, tests, runner)
    for number in range(len(tests.cases)):
        verdict, detail = _run_case(program, tests, number, runner)
        if verdict is not Verdict.CORRECT:
            return verdict, f"case {number + 1} of {len(tests.cases)}: {detail}"
    return Verdict.CORRECT, ""


def _run_asserts(program: str, tests: ProgramTests, runner: Runner) -> tuple[Verdict, str]:
    if (
        tests.prompt
        and tests.entry_point
        and not re.search(rf"^\s*def\s+{re.escape(tests.entry_point)}\b", program, re.MULTILINE)
    ):
        program = tests.prompt + program
    passed = secrets.token_hex(16)
    source = "\n".join((tests.preamble, program, tests.asserts))
    verdict, text = runner.run(Run(source, "asserts", MAX_OUTPUT_BYTES, passed))
    if verdict is Verdict.CORRECT and text != passed:
        return Verdict.INCORRECT, "the program ended before its tests did"
    return verdict, "" if verdict is Verdict.CORRECT else text


def _run_case(program: str, tests: ProgramTests, number: int, runner: Runner) -> tuple[Verdict, str]:
    given, expected = tests.cases[number]
    limit = max(MAX_OUTPUT_BYTES, 2 * len(expected.encode(errors="surrogatepass")))
    function = tests.entry_point or ""
    verdict, text = runner.run(Run(program, "function" if function else "script", limit, given, function))
    if verdict is not Verdict.CORRECT:
        return verdict, text
    equal = _same_result(text, expected, tests.perhaps_wrapped) if function else _same_output(text, expected)
    return (Verdict.CORRECT, "") if equal else (Verdict.INCORRECT, f"expected {_shown(expected)}, got {_shown(text)}")


def _same_result(text: str, expected: str, perhaps_wrapped: bool) -> bool:
    try:
        result = json.loads(text)
    except (ValueError, RecursionError):  # written by the program, not by our encoder
        return False
    wanted = json.loads(expected)
    return bool(result == wanted or (perhaps_wrapped and result == wanted[0]))


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
