"""Checkpoints are whole or absent, damaged ones are passed over, one driver per run directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.spec import CheckpointNotWritten
from orchestration import run_state
from orchestration.config import ConfigError
from orchestration.failures import RunDirectoryBusy, RunError
from orchestration.run_state import RunDirectory, RunState, damage, load_state
from tests.orchestration.simulation import simulated_config

STATE = RunState(step=3, version=4, stream={"epoch": 0, "position": 7}, pending=(("p1", 0),), counts={"trained": 6})


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(tmp_path / "run")
    found.create(simulated_config(tmp_path), resume=False)
    return found


def write(directory: RunDirectory, step: int, keep_last: int = 5) -> Path:
    state = RunState(step=step, version=step, stream={})
    with directory.new_checkpoint(state, keep_last) as aside:
        (aside / "learner").mkdir()
        (aside / "learner" / "weights.bin").write_bytes(bytes([step]) * 100)
    path = directory.latest_checkpoint()
    assert path is not None
    return path


def test_state_survives_the_round_trip(directory: RunDirectory) -> None:
    with directory.new_checkpoint(STATE, 2):
        pass
    checkpoint = directory.latest_checkpoint()
    assert checkpoint is not None
    assert load_state(checkpoint) == STATE


def test_the_newest_are_kept_and_the_best(directory: RunDirectory) -> None:
    directory.mark_best(write(directory, 1), 0.9)
    for step in (2, 3, 4):
        write(directory, step, keep_last=2)
    assert [path.name for path in sorted(directory.checkpoints.glob("step_*"))] == [
        "step_000001",
        "step_000003",
        "step_000004",
    ]
    assert directory.best() == (directory.checkpoints / "step_000001", 0.9)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: (path / "learner/weights.bin").write_bytes(b"\x02" * 99), "99 bytes"),
        (lambda path: (path / "learner/weights.bin").write_bytes(b"\x03" + b"\x02" * 99), "another digest"),
        (lambda path: (path / "learner/weights.bin").unlink(), "missing"),
        (lambda path: (path / "manifest.json").unlink(), "no readable manifest"),
        (lambda path: (path / "manifest.json").write_text("{"), "no readable manifest"),
        (lambda path: (path / "learner/extra.bin").write_bytes(b"x"), "not in the manifest"),
        (lambda path: (path / "run_state.json").write_text("{}"), "bytes"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(directory, caplog, harm, words) -> None:
    before = write(directory, 1)
    newest = write(directory, 2)
    harm(newest)
    assert words in (damage(newest) or "")
    assert directory.latest_checkpoint() == before
    assert "step_000002 is damaged" in caplog.text


def test_paths_that_lead_outside_are_refused(directory: RunDirectory, tmp_path: Path) -> None:
    path = write(directory, 1)
    secret = tmp_path / "secret"
    secret.write_bytes(b"\x01" * 100)
    (path / "learner/weights.bin").unlink()
    (path / "learner/weights.bin").symlink_to(secret)
    assert damage(path) == "learner/weights.bin leads outside"
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../../secret"] = {"size": 100, "blake2b": "0"}
    (path / "learner/weights.bin").unlink()
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert damage(path) is not None


class Crash(BaseException):
    """The process ends here."""


class CrashAt:
    """Lets `survived` calls that change the disk pass, then ends the process at the next one."""

    def __init__(self, survived: int) -> None:
        self.left = survived

    def before(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                raise Crash
            self.left -= 1
            return change(*arguments, **options)

        return wrapped


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_crash_at_any_point_of_the_writer_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool, keep_last: int
) -> None:
    """Before every fsync, write, rename and removal; a damaged one may be left, but is never what a reader takes."""
    step, crash_points = (1 if again else 2), 0
    while True:
        directory = RunDirectory(tmp_path / str(crash_points))
        directory.create(simulated_config(tmp_path), resume=False)
        write(directory, 1)
        with monkeypatch.context() as patch:
            crash = CrashAt(crash_points)
            patch.setattr(run_state, "_sync", crash.before(run_state._sync))
            patch.setattr(run_state.shutil, "rmtree", crash.before(shutil.rmtree))
            for name in ("rename", "write_text", "mkdir"):
                patch.setattr(Path, name, crash.before(getattr(Path, name)))
            try:
                write(directory, step, keep_last)
            except Crash:
                crashed = True
            else:
                crashed = False
        found = directory.latest_checkpoint()
        assert found is not None and load_state(found).step in (1, step)
        assert (found / "learner" / "weights.bin").read_bytes() == bytes([load_state(found).step]) * 100
        write(directory, 3, keep_last)
        assert len(list(directory.checkpoints.glob("step_*"))) <= keep_last, "what a crash left is pruned"
        if not crashed:
            break
        crash_points += 1
    assert crash_points >= 12


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_or_missing_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Every file, the manifest included; the checkpoint before is taken."""
    base = tmp_path_factory.mktemp("damage")
    directory = RunDirectory(base / "run")
    directory.create(simulated_config(base), resume=False)
    before, newest = write(directory, 1), write(directory, 2)
    victim = data.draw(st.sampled_from(sorted(path for path in newest.rglob("*") if path.is_file())))
    content = bytearray(victim.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    victim.write_bytes(content)
    assert directory.latest_checkpoint() == before


def test_a_run_without_a_whole_checkpoint_does_not_start_over_by_itself(directory: RunDirectory) -> None:
    assert directory.resume_point() is None
    path = write(directory, 1)
    assert directory.resume_point() == directory.checkpoint_of(1) == path
    (path / "learner/weights.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="none of the 1 checkpoints is whole"):
        directory.resume_point()
    with pytest.raises(RunError, match=r"step_000001 is damaged .*--resume"):
        directory.checkpoint_of(1)


def test_an_error_while_saving_leaves_no_trace(directory: RunDirectory) -> None:
    with pytest.raises(CheckpointNotWritten, match="no space"), directory.new_checkpoint(STATE, 2) as aside:
        (aside / "half").write_bytes(b"x")
        raise OSError("no space left")
    assert list(directory.checkpoints.iterdir()) == []


def test_a_second_driver_is_refused_until_the_first_is_gone(directory: RunDirectory) -> None:
    script = (
        "import sys, time; from pathlib import Path; from orchestration.run_state import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).lease():\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(directory.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryBusy, match=f"pid {holder.pid} on"), directory.lease():
            pass
    finally:
        holder.kill()
        holder.wait(timeout=10)
    with directory.lease():
        pass


def test_an_existing_run_is_not_overwritten_and_a_missing_one_not_resumed(tmp_path: Path) -> None:
    config = simulated_config(tmp_path)
    fresh = RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match="nothing to resume"):
        fresh.create(config, resume=True)
    fresh.create(config, resume=False)
    write(fresh, 1)
    with pytest.raises(ConfigError, match="--resume"):
        fresh.create(config, resume=False)
    fresh.create(config, resume=True)
