from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from reward import landlock
from reward.code_tests import TestsError, extract_program, read_tests, run_tests
from reward.confinement import Limits
from reward.extraction import Answer
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
MBPP = {"test_list": ["assert area(2, 3) == 6", "assert math.isclose(area(1, .5), .5)"], "test_import": ["import math"]}
STANDARD_INPUT = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7.0\n"]}
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
        (HUMANEVAL, "def sub(a, b):\n    return a - b", Verdict.INCORRECT),
        (json.dumps(HUMANEVAL), "def add(a, b):\n    return a + b", Verdict.CORRECT),
        (MBPP, "def area(a, b): return a * b", Verdict.CORRECT),
        (MBPP, "def area(a, b): return a + b", Verdict.INCORRECT),
        (MBPP, "def area(a, b: return", Verdict.UNPARSEABLE),
        (STANDARD_INPUT, "a, b = map(int, input().split())\nprint(a + b)", Verdict.CORRECT),
        (STANDARD_INPUT, "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(0)", Verdict.CORRECT),
        (STANDARD_INPUT, "print(3)", Verdict.INCORRECT),
        (STANDARD_INPUT, "print(3)\nraise SystemExit(1)", Verdict.INCORRECT),
        (FUNCTION, "class Solution:\n    def extend(self, l, x): return l + [x]", Verdict.CORRECT),
        (FUNCTION, "def extend(l, x): return l", Verdict.INCORRECT),
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
    neighbour = subprocess.Popen(["sleep", "60"])
    try:
        program = f"TARGET, FOREIGN = {str(target)!r}, {neighbour.pid}\n{ATTEMPTS}"
        gold = {"test_list": ["assert not allowed, allowed", "import decimal, threading", "t = threading.Thread()"]}
        gold["test_list"] += ["t.start(); t.join()", "import json.tool, numpy"]
        outcome = sandbox.submit(Job({"task": "code", "program": program, "gold": gold}, confined=True)).result(60)
        assert outcome.verdict is Verdict.CORRECT, outcome
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert neighbour.poll() is None
    finally:
        sandbox.close()
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
    verdict, detail = run_tests("def add(a, b): return a + b", read_tests(HUMANEVAL))
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


@pytest.mark.parametrize("gold", ["no json", "[]", {}, {"test": "x"}, {"inputs": ["1"], "outputs": []}])
def test_gold_without_tests_is_refused(gold: Any) -> None:
    with pytest.raises(TestsError):
        read_tests(gold)
