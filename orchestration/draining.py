"""Notices nodes that are about to go (preemption, scale-down, a pod that ends) while there is time to act.

Ray marks such a node *draining*: its actors go on, new ones are not placed there, and when the deadline passes all of
it dies without a signal. What we do depends on what runs there:

    driver or learner rank       stop as on SIGTERM: finish the step, checkpoint, exit 75
    rollout or verifier actor    replace it elsewhere, give it no new work, let it finish what it has

All contact with Ray's private state is in this module (tested with Ray 2.60); without it nothing is noticed and the
periodic checkpoint remains.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

POLL_S = 3.0
NO_DEADLINE_S = 3600.0
"""Assumed where the drain names no deadline."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Something of ours that lives on a node."""

    name: str
    """For the log: `learner rank 1`."""
    node_id: str
    leave: Callable[[float], None]
    """Called once with the seconds that are left."""


class DrainWatcher:
    """Tells every resident of a draining node, once."""

    def __init__(
        self,
        residents: Callable[[], Iterable[Resident]],
        *,
        draining: Callable[[], Mapping[str, float]] | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        """`residents` is asked at every poll, so replaced actors are known; tests replace `draining_nodes`."""
        self.num_drained = 0
        """Residents told so far; a metric."""
        self._residents = residents
        self._draining = draining or draining_nodes
        self._poll_s = poll_s
        self._told: set[tuple[str, str]] = set()

    async def watch(self) -> None:
        """Poll for ever; cancel it to stop."""
        from ray.exceptions import RayError

        while True:
            try:
                self.look(await asyncio.to_thread(self._draining))
            except (RayError, RuntimeError, OSError) as error:
                # The control plane is busy or gone: whoever needs it will say so; this is an early warning only.
                logger.warning("cannot see draining nodes: %s", error)
            await asyncio.sleep(self._poll_s)

    def look(self, draining: Mapping[str, float]) -> None:
        """Compare the residents with the draining nodes (node id -> seconds left)."""
        if not draining:
            return
        for resident in self._residents():
            key = (resident.name, resident.node_id)
            if resident.node_id in draining and key not in self._told:
                self._told.add(key)
                self.num_drained += 1
                seconds = draining[resident.node_id]
                logger.warning("%s: its node %s goes in %.0f s", resident.name, resident.node_id[:12], seconds)
                resident.leave(seconds)


def draining_nodes() -> dict[str, float]:
    """Node id -> seconds until it goes; empty where this Ray does not tell."""
    import ray._private.state

    ask = getattr(ray._private.state.state, "get_draining_nodes", None)
    if ask is None:
        return {}
    now_ms = time.time() * 1000  # Ray's deadlines are wall-clock times
    return {
        node_id: max(0.0, (deadline_ms - now_ms) / 1000) if deadline_ms else NO_DEADLINE_S
        for node_id, deadline_ms in ask().items()
    }


def own_node() -> str:
    """The node of this process."""
    import ray

    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def node_of(actor: Any) -> str | None:
    """The node of an actor handle; None while it has none or where this Ray does not tell."""
    import ray._private.state

    ask = getattr(ray._private.state, "actors", None)
    if ask is None:
        return None
    node_id: str | None = (ask(actor._actor_id.hex()) or {}).get("Address", {}).get("NodeID")
    return node_id or None
