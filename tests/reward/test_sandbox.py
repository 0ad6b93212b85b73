from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from reward import children
from reward.children import Child
from reward.confinement import Limits
from reward.extraction import Answer
from reward.sandbox import Job, Outcome, Sandbox, SandboxError
from reward.verdict import Verdict
from reward.wire import FrameReader, WireError, encode
from tests.reward.conftest import BUSY_S, MEMORY_MB, assert_gone
from tests.reward.hostile import TOWER, bombs

DEADLINE_S = 1.0
LATE_S = DEADLINE_S + BUSY_S
WAIT_S = 30.0


def mathematics(answer: str, gold: str = r"\boxed{42}") -> Job:
    return Job({"task": "math", "answer": answer, "gold": gold}, burns_cpu=True)


def users(text: str, gold: object = 1) -> Job:
    answer = {"response_text": text, "answer_text": text, "finish_reason": "stop", "num_tokens": None}
    return Job({"task": "user", "answer": answer, "gold": gold})


def ask(sandbox: Sandbox, job: Job) -> Outcome:
    return sandbox.submit(job).result(WAIT_S)


def test_verdicts(sandbox: Sandbox) -> None:
    assert ask(sandbox, mathematics(r"\boxed{84/2}")).verdict is Verdict.CORRECT
    assert ask(sandbox, mathematics(r"\boxed{43}")).verdict is Verdict.INCORRECT
    assert ask(sandbox, mathematics(r"\boxed{\frac}")).verdict is Verdict.UNPARSEABLE


def test_a_power_tower_costs_one_deadline_and_one_child(sandbox: Sandbox) -> None:
    before = sandbox.stats()
    began = time.monotonic()
    outcome = ask(sandbox, mathematics(TOWER))
    assert outcome.verdict is Verdict.TIMEOUT and "killed" in outcome.detail
    assert DEADLINE_S <= time.monotonic() - began < LATE_S
    assert ask(sandbox, mathematics(r"\boxed{42.0}")).verdict is Verdict.CORRECT
    after = sandbox.stats()
    assert after["children_killed"] == before["children_killed"] + 1
    kept = ("server_pid", "server_deaths")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}, "a replacement is a fork"


def test_bombs_do_not_hold_up_the_others() -> None:
    """Five bombs come first; two children; the others are served long before a deadline, wherever they queued."""
    deadline_s = 60.0
    sandbox = Sandbox(Limits(MEMORY_MB, deadline_s), processes=2)
    try:
        poisoned = [sandbox.submit(mathematics(bomb)) for bomb in bombs(5)]
        others = [sandbox.submit(mathematics(rf"\boxed{{{2 * i}/{i}}}", r"\boxed{2}")) for i in range(1, 40)]
        began = time.monotonic()
        assert {other.result(WAIT_S).verdict for other in others} == {Verdict.CORRECT}
        assert time.monotonic() - began < deadline_s / 3
        assert not any(bomb.done() for bomb in poisoned)
        assert sandbox.stats()["jobs_moved"] > 0, "no job was behind a bomb: this test shows nothing"
    finally:
        sandbox.close()


def test_memory_limit(sandbox: Sandbox) -> None:
    outcome = ask(sandbox, mathematics(r"\boxed{10^{10^{9}}}"))
    assert outcome.verdict in (Verdict.OUT_OF_MEMORY, Verdict.TIMEOUT)
    program = Job({"task": "code", "program": "x = bytearray(10**10)", "gold": {"test_list": ["assert x"]}}, True)
    assert ask(sandbox, program).verdict is Verdict.OUT_OF_MEMORY


def test_swallowed_memory_errors_are_not_wrong_answers() -> None:
    """math-verify turns MemoryError into "not equal": the sandbox must not believe it."""
    sandbox = Sandbox(Limits(64, 20.0))
    try:
        outcome = ask(sandbox, mathematics(r"\boxed{2^{3^{20}} + 1}"))
        assert outcome.verdict is Verdict.OUT_OF_MEMORY, outcome
        assert ask(sandbox, mathematics(r"\boxed{41 + 1}")).verdict is Verdict.CORRECT
    finally:
        sandbox.close()


def test_a_crash_names_the_signal_or_the_status(sandbox: Sandbox) -> None:
    killed = ask(sandbox, users("kill"))
    assert killed.verdict is Verdict.CRASH and "SIGKILL" in killed.detail
    left = ask(sandbox, users("exit"))
    assert left.verdict is Verdict.CRASH and "exit status 3" in left.detail
    unusable = ask(sandbox, users("nan"))
    assert unusable.verdict is Verdict.CRASH and "finite" in unusable.detail
    assert ask(sandbox, users("fine", 4)).reward == 8.0


def test_an_unknown_task_is_a_crash_with_its_traceback(sandbox: Sandbox) -> None:
    outcome = ask(sandbox, Job({"task": "no-such-task"}))
    assert outcome.verdict is Verdict.CRASH and "KeyError" in outcome.detail


def test_children_are_recycled() -> None:
    sandbox = Sandbox(Limits(MEMORY_MB, DEADLINE_S), recycle_after=3)
    try:
        for i in range(7):
            assert ask(sandbox, mathematics(rf"\boxed{{42+{i}-{i}}}")).verdict is Verdict.CORRECT
        assert sandbox.stats()["children_started"] == 3
    finally:
        sandbox.close()


@pytest.mark.parametrize("use_namespaces", [True, False])
def test_a_killed_fork_server_is_replaced(use_namespaces: bool) -> None:
    """And takes everything with it: a bomb in C, and a program that sleeps."""
    sandbox = Sandbox(Limits(MEMORY_MB, 30.0), processes=2, use_namespaces=use_namespaces)
    program = Job({"task": "code", "program": "import time\ntime.sleep(60)", "gold": {"test_list": ["1"]}}, True)
    try:
        jobs = [sandbox.submit(mathematics(TOWER)), sandbox.submit(program)]
        server = psutil.Process(sandbox.stats()["server_pid"])
        give_up = time.monotonic() + WAIT_S
        while len(children := server.children(recursive=True)) < 4:  # the bomb; grader, runner and program
            assert time.monotonic() < give_up, children
            time.sleep(0.02)
        time.sleep(0.3)
        children = server.children(recursive=True)
        server.kill()
        assert_gone(children)
        assert [job.result(WAIT_S).verdict for job in jobs] == [Verdict.CRASH] * 2
        assert ask(sandbox, mathematics(r"\boxed{42}")).verdict is Verdict.CORRECT
        assert sandbox.stats()["server_deaths"] == 1
    finally:
        sandbox.close()


def test_a_closed_sandbox_says_so() -> None:
    sandbox = Sandbox(Limits(MEMORY_MB, DEADLINE_S))
    waiting = sandbox.submit(mathematics(TOWER))
    time.sleep(0.2)
    sandbox.close()
    with pytest.raises(SandboxError, match="closed"):
        waiting.result(WAIT_S)
    with pytest.raises(SandboxError, match="closed"):
        ask(sandbox, mathematics(r"\boxed{1}"))


OWNER = """
import sys, time
from reward.confinement import Limits
from reward.sandbox import Job, Sandbox
sandbox = Sandbox(Limits(512, 60.0), processes=2)
for _ in range(2):
    sandbox.submit(Job({"task": "math", "answer": sys.argv[1], "gold": "1"}))
sandbox.submit(Job({"task": "code", "program": "while True: pass", "gold": {"test_list": ["1"]}}, True))
time.sleep(0.5)
print(sandbox.stats()["server_pid"], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_children_die_with_their_owner(how: signal.Signals) -> None:
    """Bombs run in C and a program loops: none may outlive the process that owned the pool."""
    command = [sys.executable, "-c", OWNER, TOWER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as owner:
        assert owner.stdout is not None
        server = psutil.Process(int(owner.stdout.readline()))
        family = [server, *server.children(recursive=True)]
        assert len(family) >= 3
        owner.send_signal(how)
        owner.wait(WAIT_S)
        assert_gone(family)


@pytest.mark.parametrize("use_namespaces", [True, False])
def test_no_secret_reaches_a_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, use_namespaces: bool) -> None:
    canary = "canary-5f1d"
    secrets = ("RAY_AUTH_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MY_OWN_API_KEY")
    for name in secrets:
        monkeypatch.setenv(name, canary)
    neighbour = subprocess.Popen(["sleep", "60"], env={"TOKEN": canary})
    secret_file = (tmp_path / "secret").open("w+")
    os.set_inheritable(secret_file.fileno(), True)
    rule = "tests.reward.user_rules:show_environment"
    sandbox = Sandbox(Limits(MEMORY_MB, DEADLINE_S), user_rule=rule, use_namespaces=use_namespaces)
    try:
        seen = ask(sandbox, users("anything")).detail
        assert "show_environment" in seen and canary not in seen
        assert not any(name in seen for name in secrets)
        snoop = (
            "import glob\nseen = b''\n"
            "for path in glob.glob('/proc/[0-9]*/environ'):\n"
            "    try: seen += open(path, 'rb').read()\n"
            "    except OSError: pass\n"
            f"assert b'{canary[:6]}' + b'{canary[6:]}' not in seen, 'found it'\n"
        )
        program = Job({"task": "code", "program": snoop, "gold": {"test_list": ["assert True"]}}, True)
        assert ask(sandbox, program).verdict is Verdict.CORRECT
        server = psutil.Process(sandbox.stats()["server_pid"])
        assert canary not in json.dumps(server.environ()) and canary not in " ".join(server.cmdline())
    finally:
        sandbox.close()
        secret_file.close()
        neighbour.kill()
        neighbour.wait(WAIT_S)


def test_frames_survive_any_cut() -> None:
    messages = [{"a": "ü\ud800"}, {"b": "x" * 1000}, {}]
    data = b"".join(encode(message) for message in messages)
    for size in (1, 3, 7, len(data)):
        reader = FrameReader()
        found = [m for i in range(0, len(data), size) for m in reader.feed(data[i : i + size])]
        assert found == messages


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x03abc"])
def test_nonsense_on_the_wire_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        FrameReader().feed(data)


def test_a_large_request_does_not_block(sandbox: Sandbox) -> None:
    """More than a socket buffer, while the child is starting."""
    outcome = ask(sandbox, users("x" * 3_000_000, 3))
    assert outcome.reward == 6.0
    assert Answer("x").final_text == "x"


@pytest.mark.parametrize(
    ("gold", "named"), [("1" * 17_000_000, "17000.* bytes exceeds the limit of 16777216"), ({"a": {1}}, "not JSON")]
)
def test_what_cannot_be_sent_concerns_nobody_else(sandbox: Sandbox, gold: object, named: str) -> None:
    outcome = ask(sandbox, users("fine", gold))
    assert outcome.verdict is Verdict.CRASH and re.search(named, outcome.detail), outcome
    assert ask(sandbox, users("fine", 4)).reward == 8.0


def test_a_starved_child_gets_a_second_try() -> None:
    """A stopped process gets no CPU, like one on an overloaded machine: that is not the answer's fault."""
    sandbox = Sandbox(Limits(MEMORY_MB, DEADLINE_S))
    try:
        assert ask(sandbox, mathematics(r"\boxed{42}")).verdict is Verdict.CORRECT
        (child,) = psutil.Process(sandbox.stats()["server_pid"]).children()
        child.suspend()
        outcome = ask(sandbox, mathematics(r"\boxed{40+2}"))
        assert outcome.verdict is Verdict.CORRECT
        assert sandbox.stats()["jobs_starved"] == 1
    finally:
        sandbox.close()


def test_only_one_second_try_and_only_for_what_never_sleeps(sandbox: Sandbox) -> None:
    before = sandbox.stats()["jobs_starved"]
    asleep = ask(sandbox, users("sleep"))
    assert asleep.verdict is Verdict.TIMEOUT and asleep.seconds < LATE_S
    assert sandbox.stats()["jobs_starved"] == before
    twice = ask(sandbox, Job(users("sleep").payload, burns_cpu=True))
    assert twice.verdict is Verdict.TIMEOUT
    assert sandbox.stats()["jobs_starved"] == before + 1


@pytest.mark.parametrize(("waited_s", "tries"), [(0.9 * DEADLINE_S, 2), (0.1 * DEADLINE_S, 1)])
def test_a_program_that_waited_for_a_cpu_gets_a_second_try(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, waited_s: float, tries: int
) -> None:
    before = sandbox.stats()["jobs_starved"]
    monkeypatch.setattr("reward.children.Child.waited_s", lambda _: waited_s)
    program = Job({"task": "code", "program": "import time\ntime.sleep(60)", "gold": {"test_list": ["1"]}}, True)
    assert ask(sandbox, program).verdict is Verdict.TIMEOUT
    assert sandbox.stats()["jobs_starved"] == before + tries - 1


@pytest.mark.skipif(
    not (Path("/proc/self/schedstat").exists() and Path(f"/proc/self/task/{os.getpid()}/children").exists()),
    reason="this kernel does not tell",
)
def test_waiting_for_a_cpu_counts_for_all_below_a_child() -> None:
    """Two that burn the same CPU, below one that sleeps: each waits while the other runs."""
    burn = "import os, time\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    burn += "if os.fork() == 0 or os.fork() == 0:\n    while True: pass\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", burn], start_new_session=True) as process, socket.socket() as unused:
        child = Child(process.pid, unused, confined=True)
        try:
            give_up = time.monotonic() + WAIT_S
            while child.waited_s() < 1.0:
                assert time.monotonic() < give_up
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(WAIT_S)
        assert child.waited_s() == 0.0


def test_where_namespaces_cannot_be_entered_programs_run_behind_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `unshare` works and mapping the user does not."""
    without = (
        "import reward.confinement, reward.fork_server as server; "
        "server._has_namespaces = lambda: False; reward.confinement.enter_namespaces = None; "
    )
    monkeypatch.setattr(
        children, "_BOOTSTRAP", children._BOOTSTRAP.replace("from reward.fork", without + "from reward.fork")
    )
    sandbox = Sandbox(Limits(MEMORY_MB, 30.0), use_namespaces=True)
    try:
        assert "namespaces" not in sandbox.isolation
        program = Job({"task": "code", "program": "x = 1", "gold": {"test_list": ["assert x == 1"]}}, True)
        assert ask(sandbox, program).verdict is Verdict.CORRECT
    finally:
        sandbox.close()


def test_what_a_killed_child_leaves_behind_is_reaped() -> None:
    """PID 1 of a container may reap nothing."""
    code = """
import os, signal, time
from reward import confinement, fork_server
confinement.adopt_orphans()
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(writer, b"x")
    time.sleep(60)
os.read(reader, 1)
fork_server._kill_group(child)
deadline = time.monotonic() + 30
while not fork_server._reaped(child):
    assert time.monotonic() < deadline
    time.sleep(0.01)
try:
    raise AssertionError(f"left: {os.waitpid(-1, os.WNOHANG)}")
except ChildProcessError:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
