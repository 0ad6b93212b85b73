"""Requests to change the pool reach the driver; bad ones do not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from orchestration import scale
from orchestration.config import ConfigError
from orchestration.run_state import RunDirectory


def test_a_run_without_a_driver_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no driver runs there"):
        scale.main(["--run", str(tmp_path), "--rollout", "2"])


def test_a_senseless_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rollout=0: give a number from 1"):
        scale.main(["--run", str(tmp_path), "--rollout", "0"])


def test_requests_arrive_once_and_garbage_is_ignored(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(scale, "LOOK_EVERY_S", 0.01)
    sizes: list[int] = []

    async def drive() -> None:
        (tmp_path / scale.CONTROL).write_text('{"rollout_actors": 9}')  # left by an earlier attempt
        task = asyncio.create_task(scale.follow_requests(tmp_path, sizes.append))
        await asyncio.sleep(0.05)
        with RunDirectory(tmp_path).lease():
            assert scale.main(["--run", str(tmp_path), "--rollout", "3"]) == 0
        await asyncio.sleep(0.1)
        for garbage in (b"{", b"\xff", b'{"rollout_actors": 0}'):
            (tmp_path / scale.CONTROL).write_bytes(garbage)
            await asyncio.sleep(0.1)
        (tmp_path / scale.CONTROL).unlink()
        (tmp_path / scale.CONTROL).mkdir()  # as good as a file system that does not answer
        await asyncio.sleep(0.1)
        (tmp_path / scale.CONTROL).rmdir()
        with RunDirectory(tmp_path).lease():
            assert scale.main(["--run", str(tmp_path), "--rollout", "4"]) == 0
        await asyncio.sleep(0.1)
        task.cancel()

    asyncio.run(drive())
    assert sizes == [3, 4]
    assert caplog.text.count("is not a request") == 3
    assert caplog.text.count("cannot be read") == 1, "once per outage"
