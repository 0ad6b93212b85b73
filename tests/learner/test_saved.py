"""A checkpoint that the driver does not see is none: files of every rank, by name and size."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from learner import saved
from learner.saved import SavedPart, until_visible
from learner.spec import CheckpointNotWritten

PARTS = [SavedPart("10.0.0.1", {"learner.json": 2}), SavedPart("10.0.0.2", {"learner/optimizer_1.pt": 3})]


@pytest.fixture
def first_rank_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The driver's node has what rank 0 wrote there."""
    monkeypatch.setattr(saved, "VISIBLE_S", 0.1)
    monkeypatch.setattr(saved, "POLL_S", 0.02)
    (tmp_path / "learner.json").write_text("{}")
    (tmp_path / "learner").mkdir()
    return tmp_path


def test_a_file_on_another_nodes_own_disk_is_named(first_rank_only: Path) -> None:
    with pytest.raises(CheckpointNotWritten) as error:
        asyncio.run(until_visible(first_rank_only, PARTS))
    words = f"{first_rank_only}/learner/optimizer_1.pt: learner rank 1 on node 10.0.0.2 wrote 3 bytes, the driver on"
    assert words in str(error.value)
    assert "sees no such file; output_dir must be on storage that all nodes share" in str(error.value)


def test_a_file_of_another_size_is_named(first_rank_only: Path) -> None:
    (first_rank_only / "learner" / "optimizer_1.pt").write_bytes(b"x")
    with pytest.raises(CheckpointNotWritten, match=r"rank 1 .* wrote 3 bytes, .* sees 1 bytes"):
        asyncio.run(until_visible(first_rank_only, PARTS))


def test_what_a_network_shows_a_moment_later_is_waited_for(
    first_rank_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "VISIBLE_S", 20.0)
    late = threading.Timer(0.2, (first_rank_only / "learner" / "optimizer_1.pt").write_bytes, [b"abc"])
    late.start()
    asyncio.run(until_visible(first_rank_only, PARTS))
    late.join()
