"""Clean-up after a test that failed half-way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest


@pytest.fixture(autouse=True)
def no_run_outlives_its_test() -> Iterator[None]:
    """A run of a million steps whose test has failed would starve every test after it."""
    yield
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if {"orchestration", "train"} <= set(child.cmdline()):
                child.kill()
