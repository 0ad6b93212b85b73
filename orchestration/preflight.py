"""Does a run fit into the cluster? Answered before any actor starts, with a table and a deadline.

    recipe --> one demand per pool --> table against the nodes that are there      (for people)
                                   --> trial reservation of all of them together   (Ray decides)

The trial is a placement group that is given back at once: it counts what other jobs hold, respects labels, and an
autoscaler sees it as demand and adds nodes for it. Not in time means not at all: no actor is left pending for ever.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from orchestration.config import Config, ConfigError
from orchestration.plan import POOL_LABEL, engine_gpus
from orchestration.watchdog import waiting_for

logger = logging.getLogger(__name__)

POOLS = ("learner", "rollout", "verifier")
REPORT_EVERY_S = 15.0
DASHBOARD_DEADLINE_S = 20
MAX_REASON_CHARS = 300
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Demand:
    """What one pool asks for: `count` actors, each whole on one node."""

    pool: str
    count: int
    cpus: float
    """Ray CPUs of one actor."""
    gpus: float
    """Ray GPUs of one actor; below 1 it shares a device."""
    label: str | None
    """Value of the node label `rl/pool` that it insists on; None takes any node."""
    keys: str
    """What to lower, for messages."""

    @property
    def each(self) -> str:
        """`2 CPU, 1 GPU`."""
        amounts = [f"{self.cpus:g} CPU"] if self.cpus else []
        return ", ".join(amounts + [f"{self.gpus:g} GPU"] * bool(self.gpus)) or "nothing"

    @property
    def bundle(self) -> dict[str, float]:
        """The same for Ray."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """What a node has and what of it is free, in Ray's units."""

    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """How many actors of a demand find a place, one pool after the other."""

    demand: Demand
    placed: int
    """On the nodes that are there, if they were empty."""
    placed_now: int
    """Beside what other jobs hold."""


def demands(config: Config, labelled: Collection[str], pools: Iterable[str] = POOLS) -> list[Demand]:
    """What the pools of a recipe ask for; those in `labelled` have nodes of their own."""
    rollout, learner, reward = config.rollout, config.learner, config.reward
    rows = {
        "learner": (learner.world_size, learner.num_cpus, learner.num_gpus, "learner.world_size"),
        "rollout": (rollout.num_actors, rollout.num_cpus, engine_gpus(config), "rollout.num_actors"),
        "verifier": (reward.num_actors, reward.num_cpus, 0.0, "reward.num_actors"),
    }
    sections = {"verifier": "reward"}
    found = []
    for pool in pools:
        count, cpus, gpus, key = rows[pool]
        section = sections.get(pool, pool)
        keys = f"{key}, {section}.num_cpus" + (f" or {section}.num_gpus" if gpus else "")
        found.append(Demand(pool, count, cpus, gpus, pool if pool in labelled else None, keys))
    return found


def fit(wanted: Sequence[Demand], nodes: Sequence[NodeRoom]) -> list[Fit]:
    """Place the demands on the nodes, the most demanding first; an estimate of what Ray will do."""
    total = _place(wanted, [_Space(node.cpus, node.gpus, node.label) for node in nodes])
    free = _place(wanted, [_Space(node.free_cpus, node.free_gpus, node.label) for node in nodes])
    return [Fit(demand, total[demand.pool], free[demand.pool]) for demand in wanted]


class _Space:
    """Room on one node while demands are placed; shares of a GPU never straddle two devices."""

    def __init__(self, cpus: float, gpus: float, label: str | None) -> None:
        self.cpus = cpus
        self.devices = [1.0] * int(gpus + ROUNDING) + ([gpus % 1] if gpus % 1 > ROUNDING else [])
        self.label = label

    def take(self, demand: Demand) -> bool:
        """Place one actor here if it fits."""
        if demand.label not in (None, self.label) or self.cpus + ROUNDING < demand.cpus:
            return False
        if 0 < demand.gpus < 1:
            device = next((i for i, share in enumerate(self.devices) if share + ROUNDING >= demand.gpus), None)
            if device is None:
                return False
            self.devices[device] -= demand.gpus
        else:
            whole = [i for i, share in enumerate(self.devices) if share + ROUNDING >= 1][: math.ceil(demand.gpus)]
            if len(whole) < demand.gpus:
                return False
            for i in whole:
                self.devices[i] = 0.0
        self.cpus -= demand.cpus
        return True


def _place(wanted: Sequence[Demand], spaces: list[_Space]) -> Counter[str]:
    placed: Counter[str] = Counter()
    spaces.sort(key=lambda space: (len(space.devices), space.label is not None))
    for demand in sorted(wanted, key=lambda demand: (demand.label is None, -demand.gpus, -demand.cpus)):
        for _ in range(demand.count):
            if not any(space.take(demand) for space in spaces):
                break
            placed[demand.pool] += 1
    return placed


def table(fits: Sequence[Fit], nodes: Sequence[NodeRoom]) -> str:
    """What was asked, pool by pool, against what the nodes give."""
    header = ("pool", "actors", "each", "on", "fit", "fit now")
    rows = [
        (
            row.demand.pool,
            str(row.demand.count),
            row.demand.each,
            f"{POOL_LABEL}={row.demand.label}" if row.demand.label else "any node",
            str(row.placed),
            str(row.placed_now),
        )
        for row in fits
    ]
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *rows)]
    return "\n".join([*(line.rstrip() for line in lines), f"nodes: {_describe_nodes(nodes)}"])


def _describe_nodes(nodes: Sequence[NodeRoom]) -> str:
    kinds = Counter((node.cpus, node.gpus, node.label) for node in nodes)
    parts = []
    for (cpus, gpus, label), count in sorted(kinds.items(), key=str):
        parts.append(
            f"{count} x {cpus:g} CPU" + (f" {gpus:g} GPU" if gpus else "") + (f" ({POOL_LABEL}={label})" * bool(label))
        )
    return ", ".join(parts) or "none"


def problems(fits: Sequence[Fit]) -> list[str]:
    """One message per row that does not fit, with the fix."""
    messages = []
    for row in fits:
        demand = row.demand
        what = f"{demand.pool}: {demand.count} x ({demand.each})"
        if demand.label:
            what += f" on nodes with {POOL_LABEL}={demand.label}"
        if row.placed < demand.count:
            messages.append(
                f"{what}: the nodes hold {row.placed}; lower {demand.keys}, add nodes, or give an autoscaler more "
                "time (cluster.startup_timeout_s)"
            )
        elif row.placed_now < demand.count:
            messages.append(
                f"{what}: there is room for {row.placed_now} beside what other jobs hold; wait for them, stop them "
                f"(`ray status`, `ray list jobs`), or lower {demand.keys}"
            )
    return messages


def cluster_nodes() -> list[NodeRoom]:
    """The live nodes of the connected cluster."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            has, left = node["Resources"], free.get(node["NodeID"], {})
            label = node.get("Labels", {}).get(POOL_LABEL)
            nodes.append(
                NodeRoom(has.get("CPU", 0), has.get("GPU", 0), left.get("CPU", 0), left.get("GPU", 0), label or None)
            )
    return nodes


def dashboard_nodes(address: str) -> list[NodeRoom]:
    """The live nodes as the dashboard at this address shows them; what other jobs hold it does not tell.

    Raises `ConfigError` where it does not answer.
    """
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        alive = list_nodes(address, filters=[("state", "=", "ALIVE")], limit=10_000, timeout=DASHBOARD_DEADLINE_S)
    except (RayStateApiException, OSError) as error:  # no RayError; requests' errors are OSErrors
        reason = " ".join(str(error).split())[:MAX_REASON_CHARS]
        raise ConfigError(f"{address}: the dashboard does not list its nodes ({reason})") from None
    nodes = []
    for node in alive:
        has, label = node.resources_total, (node.labels or {}).get(POOL_LABEL)
        cpus, gpus = float(has.get("CPU", 0)), float(has.get("GPU", 0))
        nodes.append(NodeRoom(cpus, gpus, cpus, gpus, label))
    return nodes


def labels_of(nodes: Iterable[NodeRoom]) -> frozenset[str]:
    """Pools that have nodes of their own (label `rl/pool`)."""
    return frozenset(node.label for node in nodes if node.label)


def describe_room(config: Config, nodes: Sequence[NodeRoom]) -> str:
    """The table, and a warning per row that does not fit."""
    fits = fit(demands(config, labels_of(nodes)), nodes)
    return "\n".join([table(fits, nodes), *(f"warning: {problem}" for problem in problems(fits))])


def require_room(config: Config, pools: Iterable[str], deadline_s: float) -> None:
    """Return once Ray can place all these pools together; actors may be created then.

    Raises `ConfigError` with the table and the rows that do not fit when the deadline has passed.
    """
    nodes = cluster_nodes()
    logger.info(
        "what the run asks and what the cluster has:\n%s",
        table(fit(demands(config, labels_of(nodes), pools), nodes), nodes),
    )
    started, labelled = time.monotonic(), None
    with waiting_for("room for all pools", who="driver", deadline_s=deadline_s):
        while labelled != (now := labels_of(cluster_nodes())):  # the first node of a pool's own may just have come
            labelled = now
            _wait_for_room(demands(config, labelled, pools), started, deadline_s)


def _wait_for_room(wanted: Sequence[Demand], started: float, deadline_s: float) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    places = [demand for demand in wanted for _ in range(demand.count) if demand.bundle]
    selectors = [{POOL_LABEL: demand.label} if demand.label else {} for demand in places]
    trial = placement_group([demand.bundle for demand in places], strategy="PACK", bundle_label_selector=selectors)
    try:
        while not trial.wait(min(REPORT_EVERY_S, max(0.0, started + deadline_s - time.monotonic()))):
            _report(wanted, time.monotonic() - started, deadline_s)
    finally:
        remove_placement_group(trial)


def _report(wanted: Sequence[Demand], waited_s: float, deadline_s: float) -> None:
    """Say what is awaited, or raise when the deadline has passed."""
    nodes = cluster_nodes()
    fits = fit(wanted, nodes)
    found = problems(fits) or ["each pool fits, but Ray does not place them together (see `ray status`)"]
    if waited_s >= deadline_s:
        raise ConfigError(
            "\n".join([f"the cluster has no room for this run after {waited_s:.0f} s", table(fits, nodes), *found])
        )
    logger.warning("waited %.0f of %.0f s for room: %s", waited_s, deadline_s, "; ".join(found))
