"""When Ray's object store and the disk that it spills to take no more: what that looks like, and where it is.

Ray fails the call whose result found no room (within a second, with `OutOfDiskError`); the actor is as well as before,
so the call may be made again once something was released. Importable without torch.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

ASK_DEADLINE_S = 10.0
PAUSE_S = 2.0
"""Before a call that found no room is made again."""
_OPTION = "--fallback_directory="
"""Of Ray's node process (tested: 2.60): where it spills to."""


class StoreFull(RuntimeError):
    """A result found no room on its node; the message names the node's spill directory."""


def is_store_full(error: BaseException) -> bool:
    """Whether a failed call found no room for its result."""
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError

    return isinstance(error, ObjectStoreFullError | OutOfDiskError)


async def store_full(what: str, actor: Any) -> StoreFull:
    """The error to raise for a call of this Ray actor that found no room."""
    from ray.exceptions import RayError

    try:
        async with asyncio.timeout(ASK_DEADLINE_S):
            directory = await actor.__ray_call__.remote(spill_directory)
    except (TimeoutError, RayError):
        directory = "its spill directory"
    return StoreFull(
        f"{what}: the object store of its node and {directory}, which it spills to, are full; make room there, or give "
        "Ray a larger disk (`ray start --object-spilling-directory`, `--object-store-memory`)"
    )


def spill_directory(_: object = None) -> str:
    """Where the node of this Ray worker spills objects to."""
    arguments = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
    found = [argument.removeprefix(_OPTION) for argument in arguments if argument.startswith(_OPTION)]
    return found[0] if found else "its spill directory"
