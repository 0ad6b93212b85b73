"""Checkpoints are whole or absent, damaged ones are passed over, one driver per run directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration import run_state
from orchestration.config import ConfigError
from orchestration.failures import RunDirectoryBusy
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


def test_a_crash_at_any_point_of_the_writer_leaves_the_checkpoint_before(directory, monkeypatch) -> None:
    """Every fsync and the rename is a crash point; none leaves anything that a reader would take."""
    before = write(directory, 1)
    real_sync, crash_points = run_state._sync, 0
    while True:
        calls = 0

        def crashing(path: Path, last: int = crash_points) -> None:
            nonlocal calls
            if calls == last:
                raise Crash
            calls += 1
            real_sync(path)

        monkeypatch.setattr(run_state, "_sync", crashing)
        try:
            newest = write(directory, 2)
        except Crash:
            monkeypatch.setattr(run_state, "_sync", real_sync)
            found = directory.latest_checkpoint()
            assert found == before or (found is not None and found.name == "step_000002" and damage(found) is None)
            crash_points += 1
            continue
        assert newest.name == "step_000002"
        break
    assert crash_points >= 6


def test_an_error_while_saving_leaves_no_trace(directory: RunDirectory) -> None:
    with pytest.raises(OSError, match="no space"), directory.new_checkpoint(STATE, 2) as aside:
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
