"""Fixtures of the driver's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.orchestration.ray_head import Head, ray_head


@pytest.fixture(scope="session")
def job_head() -> Iterator[Head]:
    """One real Ray head for all tests that submit jobs."""
    with ray_head() as head:
        yield head
