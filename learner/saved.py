"""Whether the driver sees what the learner ranks have written: a checkpoint that only their nodes have is none."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from learner.spec import CheckpointNotWritten

VISIBLE_S = 10.0
"""A file system over a network may take as long to show one node what another has written and synced."""
POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class SavedPart:
    """What one rank wrote of a resumable state."""

    node: str
    """Address of the rank's node."""
    sizes: dict[str, int]
    """Path below the directory -> bytes."""


async def until_visible(directory: Path, parts: Sequence[SavedPart]) -> None:
    """Return when all files of all ranks (in their order) are here; `CheckpointNotWritten` after `VISIBLE_S`."""
    deadline = time.monotonic() + VISIBLE_S
    while unseen := await asyncio.to_thread(_unseen, directory, parts):
        if time.monotonic() > deadline:
            raise CheckpointNotWritten(unseen)
        await asyncio.sleep(POLL_S)


def _unseen(directory: Path, parts: Sequence[SavedPart]) -> str | None:
    """What is wrong with the first file that a rank wrote and this process does not see as it was written."""
    for rank, part in enumerate(parts):
        for name, size in part.sizes.items():
            path = directory / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                return (
                    f"{path}: learner rank {rank} on node {part.node} wrote {size} bytes, the driver on "
                    f"{socket.gethostname()} sees {'no such file' if found is None else f'{found} bytes'}; output_dir "
                    "must be on storage that all nodes share"
                )
    return None
