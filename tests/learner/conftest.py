"""Fixtures of the learner tests."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.learner.handmade import learner_spec
from tests.learner.two_ranks import Pair


@contextmanager
def one_rank(device: str) -> Iterator[None]:
    """DeepSpeed in this process: world size 1, gone afterwards (other tests make their own process group)."""
    import deepspeed

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": device,
        }.items():
            patch.setenv(key, value)
        yield
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()


@pytest.fixture(scope="module")
def single_rank() -> Iterator[None]:
    """A world of one on the CPU."""
    with one_rank("cpu"):
        yield


@pytest.fixture(scope="package")
def pair(ray_local: None, tiny_model_dir: Path) -> Iterator[Pair]:
    """Two ranks that all tests share: most of their start is imports."""
    ranks = Pair(learner_spec(tiny_model_dir, world_size=2))
    yield ranks
    ranks.kill()
