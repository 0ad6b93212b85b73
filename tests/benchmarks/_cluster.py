"""A private Ray for benchmarks that need one; ended by whoever started it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def _token_directory() -> tempfile.TemporaryDirectory[str]:
    """With the token of every cluster of this process, which Ray reads once; gone when the process ends."""
    directory = tempfile.TemporaryDirectory(prefix="softgrpo-bench-")
    (Path(directory.name) / "auth_token").write_text("softgrpo-bench-" + os.urandom(16).hex(), encoding="utf-8")
    return directory


@contextmanager
def private_ray(num_cpus: int, object_store_mb: int) -> Iterator[None]:
    """`ray.init` on this machine with our own token; nothing is read from or left in the home directory."""
    token = Path(_token_directory().name) / "auth_token"
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_USAGE_STATS_ENABLED="0")
    import ray

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=object_store_mb * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    try:
        yield
    finally:
        ray.shutdown()
