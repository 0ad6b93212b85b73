"""Verifiers for the tests of this folder, and a check that nothing they started outlives them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest

from reward.confinement import Limits
from reward.sandbox import Sandbox
from reward.verifier import Verifier, VerifierSpec

MEMORY_MB = 512
BUSY_S = 5.0
"""By how much a busy machine may exceed a deadline; what has to be killed would run for far longer."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """Two children, one second per answer."""
    pool = Sandbox(Limits(MEMORY_MB, 1.0), processes=2, user_rule="tests.reward.user_rules:double")
    server = psutil.Process(pool.stats()["server_pid"])
    yield pool
    family = [server, *server.children(recursive=True)]
    pool.close()
    assert_gone(family)


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    """Two children, one second per answer, a user's rule."""
    spec = VerifierSpec(2, 1.0, MEMORY_MB, user_rule="tests.reward.user_rules:length_of_answer")
    made = Verifier(spec)
    yield made
    made.close()


def assert_gone(processes: list[psutil.Process], within_s: float = 5.0) -> None:
    """Every one of these processes ends in time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        alive = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return
        time.sleep(0.02)
    raise AssertionError(f"still running after {within_s} s: {alive}")
