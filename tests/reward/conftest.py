"""Verifiers for the tests of this folder, and a check that nothing they started outlives them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

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


def two_children(deadline_s: float) -> Iterator[Verifier]:
    with closing(
        Verifier(VerifierSpec(2, deadline_s, MEMORY_MB, user_rule="tests.reward.user_rules:length_of_answer"))
    ) as made:
        yield made


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    """Two children, a user's rule, and a minute per answer: a busy machine may take seconds for what is right."""
    yield from two_children(60.0)


@pytest.fixture(scope="module")
def hasty() -> Iterator[Verifier]:
    """The same with two seconds per answer, for those that never end."""
    yield from two_children(2.0)


def assert_gone(processes: list[psutil.Process], within_s: float = 5.0) -> None:
    """Every one of these processes ends in time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        alive = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return
        time.sleep(0.02)
    raise AssertionError(f"still running after {within_s} s: {alive}")
