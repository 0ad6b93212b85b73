"""Checkpoints that were torn or changed after they were written (fault matrix row 18), with real state in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestration.checkpoints import MANIFEST
from orchestration.run_state import RUN_STATE
from tests.chaos.faults import balanced
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
EVERY, KEPT = 2, 4


def truncated(checkpoint: Path) -> None:
    state = largest(checkpoint)
    with state.open("r+b") as file:
        file.truncate(state.stat().st_size // 2)


def flipped(checkpoint: Path) -> None:
    state = largest(checkpoint)
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)


def without_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def without_state(checkpoint: Path) -> None:
    (checkpoint / RUN_STATE).unlink()


def largest(checkpoint: Path) -> Path:
    """The learner's state."""
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


HARMS: tuple[tuple[Callable[[Path], None], str], ...] = (
    (truncated, "bytes, expected"),
    (flipped, "has another digest"),
    (without_manifest, "no readable manifest"),
)


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    """Three of four are damaged, each in its way: all are named, the fourth is loaded. With none left the run ends."""
    inputs, steps = make_inputs(tmp_path / "inputs"), EVERY * KEPT
    settings = {"checkpoint__every_steps": EVERY, "checkpoint__keep_last": KEPT, "tracking__mlflow": False}
    config = recipe(inputs, tmp_path / "run", steps=steps, **settings)
    first = Run(config)
    assert first.wait() == 0, first.tail()
    whole, *damaged = sorted((first.run_dir / "checkpoints").glob("step_*"))
    for checkpoint, (harm, _) in zip(damaged, HARMS, strict=True):
        harm(checkpoint)

    resumed = Run(config, "--resume")
    assert resumed.wait() == 0, resumed.tail()
    log = resumed.log.read_text(encoding="utf-8")
    for checkpoint, (_, what) in zip(damaged, HARMS, strict=True):
        assert any(checkpoint.name in line and what in line for line in log.splitlines()), f"{checkpoint.name}: {log}"
    assert [line["step"] for line in resumed.metrics()] == [*range(1, steps + 1), *range(EVERY + 1, steps + 1)]
    balanced(resumed, steps, groups_per_step=4)

    for checkpoint in (whole, *damaged):
        without_state(checkpoint)
    refused = Run(config, "--resume", f"steps={steps + 1}")
    assert refused.wait(60) == 2, refused.tail()
    assert "none of the 4 checkpoints is whole" in refused.tail()
