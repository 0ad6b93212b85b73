"""Checkpoints are whole or absent, damaged ones are passed over, one driver per run directory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.spec import CheckpointNotWritten
from orchestration import checkpoints, run_state
from orchestration.checkpoints import damage
from orchestration.config import ConfigError
from orchestration.failures import RunDirectoryBusy, RunError
from orchestration.run_state import RunDirectory, RunState, load_state
from tests.orchestration.simulation import simulated_config

STATE = RunState(step=3, version=4, stream={"epoch": 0, "position": 7}, pending=(("p1", 0),), counts={"trained": 6})


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(tmp_path / "run")
    found.create(simulated_config(tmp_path), resume=False)
    return found


def write(directory: RunDirectory, step: int, keep_last: int = 5, *, version: int | None = None) -> Path:
    """A checkpoint of this step that holds `version` (the step's number, if not given) in every file."""
    version = step if version is None else version
    state = RunState(step=step, version=version, stream={})
    with directory.new_checkpoint(state, keep_last) as aside:
        (aside / "learner").mkdir()
        (aside / "learner" / "weights.bin").write_bytes(bytes([version]) * 100)
    path = directory.checkpoint_of(step)
    assert path is not None
    return path


def names(directory: RunDirectory) -> list[str]:
    return sorted(path.name for path in directory.checkpoints.iterdir() if path.name != "best.json")


def harm(checkpoint: Path) -> None:
    (checkpoint / "learner" / "weights.bin").write_bytes(b"bad")


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
    assert names(directory) == ["step_000001", "step_000003", "step_000004"]
    assert directory.best() == (directory.checkpoints / "step_000001", 0.9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: (path / "learner/weights.bin").write_bytes(b"\x02" * 99), "99 bytes"),
        (lambda path: (path / "learner/weights.bin").write_bytes(b"\x03" + b"\x02" * 99), "another digest"),
        (lambda path: (path / "learner/weights.bin").unlink(), "missing"),
        (lambda path: (path / "manifest.json").unlink(), "no readable manifest"),
        (lambda path: (path / "manifest.json").write_text("{"), "no readable manifest"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"run_state.json": {}}}'), "no readable manifest"),
        (lambda path: (path / "manifest.json").write_text('{"files": [1]}'), "no readable manifest"),
        (lambda path: (path / "learner/extra.bin").write_bytes(b"x"), "not in the manifest"),
        (lambda path: (path / "run_state.json").write_text("{}"), "bytes"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(directory, caplog, change, words) -> None:
    before = write(directory, 1)
    newest = write(directory, 2)
    change(newest)
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
    """Before every fsync, write, rename and removal; a damaged one may be left, but is never what a reader takes.

    The new one counts from the moment of its rename, also beside an old one of the same step.
    """
    step, crash_points = (1 if again else 2), 0
    while True:
        directory = RunDirectory(tmp_path / str(crash_points))
        directory.create(simulated_config(tmp_path), resume=False)
        write(directory, 1)
        with monkeypatch.context() as patch:
            crash = CrashAt(crash_points)
            for module in (checkpoints, run_state):
                patch.setattr(module, "sync", crash.before(module.sync))
            patch.setattr(shutil, "rmtree", crash.before(shutil.rmtree))
            for name in ("rename", "write_text", "write_bytes", "mkdir"):
                patch.setattr(Path, name, crash.before(getattr(Path, name)))
            try:
                write(directory, step, keep_last, version=9)
            except Crash:
                crashed = True
            else:
                crashed = False
        weights = directory.checkpoints / f"step_{step:06d}" / "learner" / "weights.bin"
        expected = (step, 9) if weights.is_file() and weights.read_bytes()[0] == 9 else (1, 1)
        check_what_is_left(directory, expected)
        resumed = RunDirectory(directory.path)
        with resumed.lease():
            found = resumed.resume_point()
            assert found is not None and resumed.checkpoint_of(load_state(found).step) == found == resumed.last
            check_what_is_left(resumed, expected)
            write(resumed, 3, keep_last)
        assert len(names(resumed)) <= keep_last, "what a crash left is gone"
        if not crashed:
            break
        crash_points += 1
    assert crash_points >= 12


def check_what_is_left(directory: RunDirectory, expected: tuple[int, int]) -> None:
    found = directory.latest_checkpoint()
    assert found is not None
    state = load_state(found)
    assert (state.step, state.version) == expected
    assert (found / "learner" / "weights.bin").read_bytes() == bytes([state.version]) * 100


def test_everything_is_on_disk_before_the_rename_and_the_rename_after_it(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(Path, "rename", renamed)
        final = write(directory, 1)
    aside = directory.checkpoints / ".writing-000001"
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    everything = {str(aside / path.relative_to(final)) for path in final.rglob("*")} | {str(aside)}
    assert everything == set(before)
    assert before.index(str(aside / "manifest.json")) > before.index(str(aside / "learner" / "weights.bin"))
    assert before[-1] == str(aside), "its entries last"
    assert after[0] == str(directory.checkpoints)


def test_the_place_of_a_new_run_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    directory = RunDirectory(tmp_path / "outputs" / "run")
    with directory.lease():
        directory.create(simulated_config(tmp_path), resume=False)
    assert {str(tmp_path), str(tmp_path / "outputs"), str(directory.path)} <= set(synced)


@pytest.mark.parametrize("best", [10, 50])
def test_the_one_just_written_is_kept_whatever_lies_around_it(directory: RunDirectory, best: int) -> None:
    """The newest two are damaged: the run goes on from 10, and what it writes from there must not be hidden by them."""
    for step in (10, 40, 50):
        path = write(directory, step, 5)
        if step == best:
            directory.mark_best(path, 0.9)
    for step in (40, 50):
        harm(directory.checkpoints / f"step_{step:06d}")
    assert directory.resume_point() == directory.checkpoints / "step_000010"
    written = write(directory, 20, keep_last=2)
    assert directory.latest_checkpoint() == directory.checkpoint_of(20) == directory.last == written
    assert names(directory) == ["step_000010", "step_000020"]
    assert directory.best() == ((directory.checkpoints / "step_000010", 0.9) if best == 10 else None)


def test_keep_last_counts_backwards_from_the_one_just_written(directory: RunDirectory) -> None:
    for step in (10, 20, 30):
        write(directory, step)
    harm(directory.checkpoints / "step_000030")
    write(directory, 25, keep_last=1)
    assert names(directory) == ["step_000025"]


def test_a_replaced_one_is_taken_where_its_successor_is_damaged(directory: RunDirectory) -> None:
    shutil.copytree(write(directory, 3), directory.checkpoints / "step_000003.replaced")
    harm(directory.checkpoints / "step_000003")
    with directory.lease():
        found = directory.resume_point()
        assert found == directory.checkpoint_of(3) == directory.checkpoints / "step_000003"
    assert names(directory) == ["step_000003"]


def test_what_a_killed_process_left_is_removed(directory: RunDirectory) -> None:
    write(directory, 3)
    for name in (".writing-000007", ".step_000003.learner.universal"):
        (directory.checkpoints / name / "learner").mkdir(parents=True)
    assert not directory.is_writing(7), "nobody is"
    with directory.lease():
        assert names(directory) == ["step_000003"]
        with directory.new_checkpoint(STATE, 2):
            assert directory.is_writing(STATE.step)
        assert not directory.is_writing(STATE.step)


def test_a_checkpoint_may_be_finished_on_another_thread(directory: RunDirectory) -> None:
    writing = directory.new_checkpoint(STATE, 2)
    writing.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(writing.__exit__, None, None, None).result(timeout=20)
    assert directory.checkpoint_of(STATE.step) == directory.last
    assert not directory.is_writing(STATE.step)


def test_a_checkpoint_holds_the_recipe_and_where_tracking_was(directory: RunDirectory) -> None:
    """As they are on disk after a flush, which comes first."""
    tracking = directory.path / "tracking.json"
    directory.flush = lambda: tracking.write_text('{"cursor": 7}') and None
    path = write(directory, 1)
    tracking.write_text('{"cursor": 9}')
    assert (path / "tracking.json").read_text() == '{"cursor": 7}'
    assert (path / "config.yaml").read_bytes() == (directory.path / "config.yaml").read_bytes()
    assert damage(path) is None


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
    position = data.draw(st.integers(0, 2**16)) % len(content)
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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    directory: RunDirectory, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_state.fcntl, "flock", refuse)
    with (
        pytest.raises(RunError, match=r"the file system at /\S* does not lock files .*set output_dir"),
        directory.lease(),
    ):
        pass


def test_an_existing_run_is_not_overwritten_and_a_missing_one_not_resumed(tmp_path: Path) -> None:
    config = simulated_config(tmp_path)
    fresh = RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match="nothing to resume"):
        fresh.check(resume=True)
    assert not fresh.path.exists()
    fresh.path.mkdir()
    fresh.check(resume=True)
    (fresh.path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="nothing to resume"):
        fresh.check(resume=True)
    assert not fresh.is_run()
    with fresh.lease():
        fresh.check(resume=True)
        assert fresh.is_run(), "killed here, it can be resumed"
        fresh.create(config, resume=False)
    write(fresh, 1)
    with pytest.raises(ConfigError, match="--resume"):
        fresh.check(resume=False)
    with pytest.raises(ConfigError, match="--resume"):
        fresh.create(config, resume=False)
    fresh.create(config, resume=True)
