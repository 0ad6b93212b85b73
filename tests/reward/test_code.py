from __future__ import annotations

import json
import socket
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from reward import landlock
from reward.code_tests import TestsError, check_tests, extract_program, read_tests, run_tests
from reward.confinement import Limits
from reward.extraction import Answer
from reward.program_runner import Runner
from reward.sandbox import Job, Sandbox
from reward.verdict import Grade, Verdict
from reward.verifier import Verifier
from tests.reward.conftest import BUSY_S, MEMORY_MB, assert_gone
from tests.reward.hostile import hostile_programs

HUMANEVAL = {
    "prompt": "def add(a, b):\n    ",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}
METHOD = HUMANEVAL | {"prompt": "import math\n", "entry_point": "Solution(*()).add"}
MBPP = {"test_list": ["assert area(2, 3) == 6", "assert math.isclose(area(1, .5), .5)"], "test_import": ["import math"]}
STANDARD_INPUT = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7.0\n"]}
APPS_FUNCTION = {"fn_name": "f", "inputs": [[[1, 2], "a"], [[5], "b"]], "outputs": ["3a", "5b"]}
APPS_WRAPPED = {"fn_name": "f", "inputs": [[[1, 2]], [[5]]], "outputs": [[3], [5]]}
APPS_LINES = {"inputs": [["1", "2"], "3\n4\n"], "outputs": [["3", "."], "7\n.\n"]}
LONG_TEXT = ("x" * 79 + "\n") * 15_000
LONG_LIST = {"fn_name": "f", "inputs": ["180000"], "outputs": [json.dumps(list(range(180_000)), separators=(",", ":"))]}
THREAD = "def main():\n    time.sleep(0.2)\n    print(int(input()[0]) * 2 + 1)\n"
SMALL = {"inputs": ["1 2\n"], "outputs": ["3\n"]}
FUNCTION = {"test_cases": [{"input": "[1, 2]\n3", "output": "[1, 2, 3]"}], "fn_name": "extend"}


def run(verifier: Verifier, programs: list[str], gold: dict[str, Any] | str) -> list[Grade]:
    answers = [Answer(text, text) for text in (f"Here it is:\n```python\n{program}\n```\n" for program in programs)]
    return verifier.score(answers, [gold] * len(answers), ["code"] * len(answers))


@pytest.mark.parametrize(
    ("gold", "program", "verdict"),
    [
        (HUMANEVAL, "def add(a, b):\n    return a + b", Verdict.CORRECT),
        (HUMANEVAL, "return a + b", Verdict.CORRECT),
        (HUMANEVAL, "def add(a, b):\n    return a - b", Verdict.INCORRECT),
        (METHOD, "class Solution:\n    def add(self, a, b): return a + b", Verdict.CORRECT),
        (HUMANEVAL, "def sub(a, b):\n    return a - b", Verdict.INCORRECT),
        (json.dumps(HUMANEVAL), "def add(a, b):\n    return a + b", Verdict.CORRECT),
        (MBPP, "def area(a, b): return a * b", Verdict.CORRECT),
        (MBPP, "def area(a, b): return a + b", Verdict.INCORRECT),
        (MBPP, "def area(a, b: return", Verdict.UNPARSEABLE),
        (STANDARD_INPUT, "a, b = map(int, input().split())\nprint(a + b)", Verdict.CORRECT),
        (STANDARD_INPUT, "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(0)", Verdict.CORRECT),
        (STANDARD_INPUT, "print(3)", Verdict.INCORRECT),
        (
            STANDARD_INPUT,
            "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach())\nprint(sum(map(int, input().split())))",
            Verdict.CORRECT,
        ),
        (
            STANDARD_INPUT,
            "import argparse\nargparse.ArgumentParser().parse_args()\nprint(sum(map(int, input().split())))",
            Verdict.CORRECT,
        ),
        (STANDARD_INPUT, "import os\nos.closerange(3, 100)\nprint(sum(map(int, input().split())))", Verdict.CORRECT),
        (STANDARD_INPUT, "def f(x: List[int]): pass\nprint(sum(map(int, input().split())))", Verdict.INCORRECT),
        (STANDARD_INPUT, "print(3)\nraise SystemExit(1)", Verdict.INCORRECT),
        (FUNCTION, "class Solution:\n    def extend(self, l, x): return l + [x]", Verdict.CORRECT),
        (FUNCTION, "def extend(l, x): return l", Verdict.INCORRECT),
        (FUNCTION, "print(1)\ndef extend(l, x): return l + [x]", Verdict.CORRECT),
        (APPS_FUNCTION, "def f(l, text): return f'{sum(l)}{text}'", Verdict.CORRECT),
        (APPS_FUNCTION, "def f(l, text): return sum(l)", Verdict.INCORRECT),
        (APPS_WRAPPED, "def f(l): return sum(l)", Verdict.CORRECT),
        (APPS_WRAPPED, "def f(l): return [sum(l)]", Verdict.CORRECT),
        (APPS_WRAPPED, "def f(l): return len(l)", Verdict.INCORRECT),
        (APPS_LINES, "print(int(input()) + int(input()))\nprint('.')", Verdict.CORRECT),
        (APPS_LINES, "print(int(input()) - int(input()))\nprint('.')", Verdict.INCORRECT),
        ({"inputs": [LONG_TEXT], "outputs": [LONG_TEXT]}, "import sys\nprint(sys.stdin.read())", Verdict.CORRECT),
        (SMALL, "print('3' + ' ' * 2_000_000)", Verdict.INCORRECT),
        (LONG_LIST, "def f(n): return list(range(n))", Verdict.CORRECT),
        (SMALL, "import sys\nprint(2 + int(sys.stdin.buffer.peek(1)[:1]))", Verdict.CORRECT),  # buffered: fast lines
        (SMALL, f"import threading, time\n{THREAD}threading.Thread(target=main).start()", Verdict.CORRECT),
        (SMALL, "import atexit\natexit.register(print, 3)", Verdict.CORRECT),
        (SMALL, "import atexit\natexit.register(print, 3)\nraise SystemExit(1)", Verdict.INCORRECT),
        (SMALL, "import os, sys\nos.write(sys.stdout.fileno(), b'3')", Verdict.CORRECT),
        (SMALL, "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint(3)", Verdict.CORRECT),
        (FUNCTION, "import numpy\ndef extend(l, x): return numpy.array([*l, x]).tolist()", Verdict.CORRECT),
    ],
)
def test_programs(verifier: Verifier, gold: dict[str, Any] | str, program: str, verdict: Verdict) -> None:
    (grade,) = run(verifier, [program], gold)
    assert grade.verdict is verdict, grade
    assert grade.extracted == program


def test_hostile_programs(hasty: Verifier) -> None:
    """None passes, none outlives its deadline, none leaves a trace."""
    programs = hostile_programs()
    grades = run(hasty, programs, HUMANEVAL | {"prompt": ""})
    passed = [(p, g) for p, g in zip(programs, grades, strict=True) if g.verdict is Verdict.CORRECT]
    assert not passed
    assert max(grade.seconds for grade in grades) < 2.0 + BUSY_S
    late = {grade.detail for grade in grades if grade.verdict is Verdict.TIMEOUT}
    assert late == {"no verdict within 2 s; killed"}, "the CPU of the child is not that of the program"
    assert not Path("/tmp/softgrpo-hostile").exists()
    assert run(hasty, ["def add(a, b): return a + b"], HUMANEVAL)[0].verdict is Verdict.CORRECT


ATTEMPTS = """
import ctypes, fcntl, mmap, os, resource, signal, socket, struct, subprocess, sys

def refused(action):
    try:
        action()
    except OSError:
        return True
    return False

def own(set_owner):
    pipe, other = socket.socketpair()
    set_owner(pipe)
    fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    other.send(b"a signal to the owner")

def datagrams():
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

def signal_by_pipe():
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, FOREIGN)
    fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    os.write(writer, b"x")

attempts = {
    "signal by pipe": signal_by_pipe,
    "own by F_SETOWN_EX": lambda: own(lambda file: fcntl.fcntl(file, 15, struct.pack("ii", 1, FOREIGN))),
    "own by FIOSETOWN": lambda: own(lambda file: fcntl.ioctl(file, 0x8901, struct.pack("i", FOREIGN))),
    "own by SIOCSPGRP": lambda: own(lambda file: fcntl.ioctl(file, 0x8902, struct.pack("i", FOREIGN))),
    "choose the signal": lambda: fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL),
    "schedule another": lambda: os.sched_setparam(FOREIGN, os.sched_param(0)),
    "fork": os.fork,
    "run": lambda: subprocess.run(["/bin/true"]),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "socket": socket.socket,
    "send": lambda: datagrams()[0].sendto(b"out", SOCKET),
    "send a message": lambda: datagrams()[0].sendmsg([b"out"], [], 0, SOCKET),
    "bind": lambda: datagrams()[0].bind(TARGET + "-new"),
    "signal the parent": lambda: os.kill(os.getppid(), 0),
    "signal everybody": lambda: os.kill(-1, 0),
    "limit the parent": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0)),
    "new session": os.setsid,
    "new group": lambda: os.setpgid(0, 0),
    "write": lambda: open(TARGET, "a"),
    "create": lambda: os.open(TARGET + "-new", os.O_CREAT | os.O_WRONLY),
    "unlink": lambda: os.unlink(TARGET),
    "rename": lambda: os.rename(TARGET, TARGET + "-new"),
    "mkdir": lambda: os.mkdir(TARGET + "-new"),
    "chmod": lambda: os.chmod(TARGET, 0o777),
    "truncate": lambda: os.truncate(TARGET, 0),
    "link": lambda: os.link(TARGET, TARGET + "-new"),
    "symlink": lambda: os.symlink(TARGET, TARGET + "-new"),
    "times": lambda: os.utime(TARGET),
    "host name": lambda: socket.sethostname("softgrpo-test"),
}
left, right = socket.socketpair()
left.send(b"inside"), left.sendall(b"inside")  # asyncio does so
allowed = [name for name, action in attempts.items() if not refused(action)]
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {"io_uring": 425, "pidfd_open": 434, "openat2": 437}.items():
    if libc.syscall(number, 0, 0, 0, 0) >= 0:
        allowed.append(name)
"""


@pytest.mark.parametrize("use_namespaces", [True, False])
def test_what_a_program_may_not_do(tmp_path: Path, use_namespaces: bool) -> None:
    """No processes, network, signals or writes; reading its libraries and threads stay possible."""
    target = tmp_path / "file"
    target.write_text("kept")
    sandbox = Sandbox(Limits(MEMORY_MB, 10.0), use_namespaces=use_namespaces)
    neighbour, listens = subprocess.Popen(["sleep", "60"]), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        listens.bind(str(tmp_path / "s"))
        program = f"TARGET, SOCKET, FOREIGN = {str(target)!r}, {str(tmp_path / 's')!r}, {neighbour.pid}\n{ATTEMPTS}"
        gold = {"test_list": ["assert not allowed, allowed", "import decimal, threading", "t = threading.Thread()"]}
        gold["test_list"] += ["t.start(); t.join()", "import json.tool, numpy"]
        outcome = sandbox.submit(Job({"task": "code", "program": program, "gold": gold}, confined=True)).result(60)
        assert outcome.verdict is Verdict.CORRECT, outcome
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "s"]
        assert neighbour.poll() is None
    finally:
        sandbox.close()
        listens.close()
        neighbour.kill()
        neighbour.wait()


@pytest.mark.skipif(not landlock.is_supported(), reason="this kernel has no Landlock")
def test_a_program_reads_nothing_but_libraries(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    program = (
        "import os\nread = []\n"
        f"for path in [{str(secret)!r}, '/proc/self/environ', f'/proc/{{os.getppid()}}/environ', '/etc/passwd']:\n"
        "    try: read.append(open(path).read())\n"
        "    except PermissionError: pass\n"
        "for path in ['/', '/proc', '/tmp', os.getcwd()]:\n"
        "    try: read.append(os.listdir(path))\n"
        "    except PermissionError: pass\n"
    )
    gold = {"test_list": ["assert not read, read", "import sqlite3, zoneinfo"]}
    sandbox = Sandbox(Limits(MEMORY_MB, 10.0), use_namespaces=False)
    try:
        outcome = sandbox.submit(Job({"task": "code", "program": program, "gold": gold}, confined=True)).result(60)
        assert outcome.verdict is Verdict.CORRECT, outcome
    finally:
        sandbox.close()


def test_hostile_programs_behind_the_filter_alone() -> None:
    """Where the kernel gives no namespaces, as in most containers."""
    sandbox = Sandbox(Limits(MEMORY_MB, 1.0), processes=2, use_namespaces=False)
    server = psutil.Process(sandbox.stats()["server_pid"])
    try:
        assert "filter" in sandbox.isolation and "namespaces" not in sandbox.isolation
        programs = [*hostile_programs(), "def add(a, b): return a + b"]
        gold = HUMANEVAL | {"prompt": ""}
        jobs = [Job({"task": "code", "program": program, "gold": gold}, confined=True) for program in programs]
        outcomes = [future.result(60) for future in map(sandbox.submit, jobs)]
        assert [outcome.verdict is Verdict.CORRECT for outcome in outcomes] == [False] * (len(jobs) - 1) + [True]
        assert max(outcome.seconds for outcome in outcomes) < 1.0 + BUSY_S
        assert_gone(server.children(recursive=True))
        assert sandbox.stats()["server_deaths"] == 0 and not Path("/tmp/softgrpo-hostile").exists()
    finally:
        sandbox.close()


def test_an_unconfined_program_is_a_crash_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process's own child: what cannot be confined must not look like a wrong answer."""

    def refuse() -> None:
        raise OSError("no such call")

    monkeypatch.setattr("reward.seccomp.install", refuse)
    with closing(Runner(Limits(MEMORY_MB, 10.0))) as runner:
        verdict, detail = run_tests("def add(a, b): return a + b", read_tests(HUMANEVAL), runner)
    assert verdict is Verdict.CRASH and "could not be confined" in detail and "no such call" in detail


def test_hostile_programs_on_standard_input(hasty: Verifier) -> None:
    grades = run(hasty, hostile_programs(), STANDARD_INPUT)
    assert Verdict.CORRECT not in {grade.verdict for grade in grades}


def test_real_tasks(verifier: Verifier, hasty: Verifier, shared_dir: Path) -> None:
    """Reference solutions of HumanEval and MBPP pass; the same code with its results negated does not."""
    rows = json.loads((shared_dir / "data" / "humaneval.json").read_text())[::16]
    golds = [row["final_answer"] for row in rows]
    programs = [row["prompt"][0]["value"] + gold["canonical_solution"] for row, gold in zip(rows, golds, strict=True)]
    rows = json.loads((shared_dir / "data" / "mbpp.json").read_text())[::24]
    golds += [row["final_answer"] for row in rows]
    programs += [row["final_answer"]["code"] for row in rows]
    answers = [Answer(f"```python\n{program}\n```") for program in programs]
    grades = verifier.score(answers, golds, ["code"] * len(answers))
    assert [g for g in grades if g.verdict is not Verdict.CORRECT] == []
    broken = [Answer(a.response_text.replace("return ", "return not ")) for a in answers]
    wrong = hasty.score(broken, golds, ["code"] * len(answers))
    assert sum(grade.verdict is Verdict.CORRECT for grade in wrong) <= 1


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na = 1\n```", "a = 1"),
        ("```\na = 1\n```", "a = 1"),
        ("first\n```py\na\n```\nbetter\n```python\nb\nc\n```\n", "b\nc"),
        ("```python\na\n```\nand ```", "a"),
        ("a = 1\n", "a = 1"),
        ("```python\nunclosed", None),
        ("", None),
        ("``````", None),
    ],
)
def test_extract_program(text: str, program: str | None) -> None:
    assert extract_program(text) == program


@pytest.mark.parametrize(
    ("gold", "named"),
    [
        ("no json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "a list, not an object"),
        ({}, "expected test and entry_point"),
        ({"test": "x"}, "expected test and entry_point"),
        ({"test": ["x"], "entry_point": "f"}, "test of .* is a list"),
        ({"test_list": ["assert f()", 1]}, "test_list"),
        ({"test_list": ["assert f()"], "test_import": "import math"}, "test_import"),
        ({"inputs": ["1"], "outputs": []}, "lists of one length"),
        ({"inputs": "1", "outputs": "2"}, "lists of one length"),
        ({"test_cases": ["1"]}, "list of objects"),
        ({"test_cases": [{"input": "1", "output": "1"}, {"input": "1"}]}, "case 2 of 2 has no output"),
        ({"inputs": ["1", [1]], "outputs": ["1", "1"]}, r"case 2 of 2: its input is \[1\]; .*fn_name is missing"),
        ({"inputs": ["1"], "outputs": [1]}, "case 1 of 1: its output is 1; it must be text"),
        ({"fn_name": "f", "inputs": [1], "outputs": [1]}, "case 1 of 1: its input is 1; with fn_name"),
        ({"fn_name": "f", "inputs": ["1\n[2"], "outputs": ["1"]}, "its input .* is not JSON"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["True"]}, "its output 'True' is not JSON"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["NaN"]}, "NaN"),
        ({"fn_name": "a.b", "inputs": ["1"], "outputs": ["1"]}, "fn_name 'a.b' .* is not the name"),
        ({"fn_name": 1, "inputs": ["1"], "outputs": ["1"]}, "fn_name of .* is a int"),
        ({"inputs": ["1" * 8_000_000] * 2, "outputs": ["1"] * 2}, "takes 16000.* bytes .* the limit is 15728640"),
        ({"inputs": ["1 " * 4_500_000] * 2, "outputs": ["1"] * 2}, "18000.* exceeds the limit of 16777216"),
        ({"test_list": [b"assert 1"]}, "not JSON"),
    ],
)
def test_gold_that_no_program_passes_is_refused(gold: Any, named: str) -> None:
    with pytest.raises(TestsError, match=named):
        check_tests(gold)


SEARCH = """
import gc, sys

def reachable():
    \"\"\"All text and bytes that frames and the heap lead to.\"\"\"
    found, seen = [sys._getframe(), *gc.get_objects()], set()
    while found:
        thing = found.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (str, bytes, bytearray)):
            yield thing if isinstance(thing, str) else bytes(thing).decode(errors="replace")
        found += gc.get_referents(thing)
        if isinstance(thing, type(sys._getframe())):
            found += [thing.f_back, *thing.f_locals.values()]

def find(*_):
    mark = "detcepxe-terces"  # reversed: what this program itself holds does not count
    return mark[::-1] if any(mark in text[::-1] for text in reachable()) else "nothing"
"""


@pytest.mark.parametrize(
    ("gold", "program"),
    [
        ({"inputs": ["1 2\n", "3 4\n"], "outputs": ["secret-expected\n"] * 2}, f"{SEARCH}print(find())"),
        ({"inputs": ["1", "2"], "outputs": ['"secret-expected"'] * 2, "fn_name": "find"}, SEARCH),
        (
            {"test_cases": [{"input": ["1"], "output": "secret-expected"}] * 2, "fn_name": "f"},
            f"{SEARCH}\nclass Solution:\n    def f(self, _): return find()",
        ),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_no_program_can_find_its_expected_output(verifier: Verifier, gold: Any, program: str, as_text: bool) -> None:
    (grade,) = run(verifier, [program], json.dumps(gold) if as_text else gold)
    assert grade.verdict is Verdict.INCORRECT and "nothing" in grade.detail, grade
