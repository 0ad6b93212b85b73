"""Rules of the house that a reviewer would otherwise have to look for: bounded waits, monotonic clocks, no prints."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import TOGETHER

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("orchestration", "learner", "rollout", "reward")
BOUNDED_BY = {
    "ray.get": "timeout",
    "ray.wait": "timeout",
    "subprocess.run": "timeout",
    "subprocess.check_output": "timeout",
    "urllib.request.urlopen": "timeout",
    "socket.create_connection": "timeout",
}
WALL_CLOCK = {
    "orchestration/metrics_log.py": "time of a line, for people and MLflow",
    "orchestration/draining.py": "Ray's deadlines are wall-clock times",
}
"""Where `time.time()` is meant: a clock that jumps must not move a deadline or a duration (fault matrix row 25)."""
PRINTERS = {"orchestration"}
"""Commands talk to people on stdout; workers log."""


@functools.cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """(file, dotted name, call) of every call in the source."""
    return list(_read_calls())


def _read_calls() -> Iterator[tuple[str, str, ast.Call]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node


def test_every_wait_has_a_deadline() -> None:
    unbounded = [
        f"{file}:{call.lineno}: {name}"
        for file, name, call in calls()
        if name in BOUNDED_BY and BOUNDED_BY[name] not in {keyword.arg for keyword in call.keywords}
    ]
    assert unbounded == []


def test_threads_and_queues_are_not_waited_for_for_ever() -> None:
    unbounded = [
        f"{file}:{call.lineno}: {name}"
        for file, name, call in calls()
        if name.endswith((".join", ".communicate")) and not call.args and not call.keywords
    ]
    assert unbounded == []


def test_durations_use_the_monotonic_clock() -> None:
    found = {file for file, name, _ in calls() if name in ("time.time", "datetime.now", "datetime.datetime.now")}
    assert found <= set(WALL_CLOCK)


def test_workers_do_not_print() -> None:
    printing = {file for file, name, _ in calls() if name == "print"}
    assert {file for file in printing if file.split("/")[0] not in PRINTERS} == set()


def test_yaml_is_loaded_safely_and_nothing_is_evaluated() -> None:
    forbidden = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads", "os.system"}
    found = [f"{file}:{call.lineno}: {name}" for file, name, call in calls() if name in forbidden]
    found += [f"{file}:{call.lineno}: {name}" for file, name, call in calls() if name in ("eval", "exec")]
    assert [place for place in found if not place.startswith("reward/")] == []


def test_torch_loads_weights_only_unless_the_manifest_was_checked() -> None:
    unsafe = [
        file
        for file, name, call in calls()
        if name == "torch.load"
        and not any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in call.keywords)
    ]
    assert unsafe == []


def test_what_runs_together_exists() -> None:
    """A file that was renamed would leave its group in silence."""
    found = {path.name for path in (ROOT / "tests").rglob("*") if path.suffix == ".py" or path.is_dir()}
    assert set(TOGETHER) <= found
