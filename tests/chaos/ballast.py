"""Something else that takes room in the object store of a node, and what Ray says of that store."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

CHUNK_BYTES = 4 * 2**20


@ray.remote(num_cpus=1)
class Ballast:
    """Holds objects in the store of its node."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    def hold(self, num_bytes: int | None) -> int:
        """Hold so many bytes more, or (None) as many as the store and its disk take; bytes held."""
        wanted = 10**9 if num_bytes is None else num_bytes // CHUNK_BYTES
        for _ in range(wanted):
            try:
                self._held.append(ray.put(np.ones(CHUNK_BYTES, np.uint8)))
            except ray.exceptions.OutOfDiskError:
                break
        return len(self._held) * CHUNK_BYTES

    def release(self) -> None:
        """Hold nothing any more."""
        self._held.clear()


def store_stats(node: Any) -> Any:
    """Ray's own statistics of a node's store (object_store_bytes_used, spilled_bytes_total, ...)."""
    from ray._private.internal_api import node_stats

    (found,) = (each for each in ray.nodes() if each["NodeID"] == node.node_id)
    return node_stats(found["NodeManagerAddress"], found["NodeManagerPort"]).store_stats
