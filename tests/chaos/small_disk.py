"""A disk of its own that can be filled to the last byte: a small tmpfs, which takes root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MEBIBYTE = 2**20


@contextmanager
def small_disk(path: Path, size_mb: int) -> Iterator[Path]:
    """Mounted at `path` inside the block; skips the test where mounting is not allowed."""
    path.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs a file system of its own: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room; the file that took it. Removing it makes room again."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (MEBIBYTE, 4096, 1):
            try:
                while os.write(file.fileno(), b"\0" * size):
                    pass
            except OSError:
                continue
    return ballast
