"""Ray for one run: a local cluster where there is none, the job's cluster where there is one."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from orchestration import preflight
from orchestration.config import Config, ConfigError
from orchestration.failures import within
from orchestration.machine import num_cpus
from orchestration.plan import Plan, source_path
from orchestration.validate import pool_needs, uses_local_cluster

logger = logging.getLogger(__name__)

CONNECT_DEADLINE_S = 5.0
LOCAL_ROOM_S = 10.0
"""A cluster of our own is as large as it will ever be."""


@contextmanager
def connected(config: Config, pools: Iterable[str] = preflight.POOLS) -> Iterator[None]:
    """Ray is up inside the block, with room for these pools, and every actor of this run is gone after it.

    Raises `ConfigError` where there is no room within `cluster.startup_timeout_s`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray logs an environment variable into every worker; the accelerator override is its own future default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Whatever is awaited is reported by who awaits it. Of calls given up (aborted groups) Ray would print a stack each.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    import ray

    worker_environment = {
        "env_vars": source_path(),
        "worker_process_setup_hook": "orchestration.logs.setup_worker",
    }
    if uses_local_cluster(config):
        wanted = math.ceil(pool_needs(config).cpus)
        ray.init(
            address="local",
            num_cpus=config.cluster.local_cpus or max(wanted, num_cpus()),
            object_store_memory=config.cluster.object_store_mb * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env=worker_environment,
        )
    else:
        ray.init(
            address=find_cluster(config),
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env=worker_environment,
        )
    try:
        if uses_local_cluster(config):
            preflight.require_room(config, pools, LOCAL_ROOM_S)
        else:
            preflight.require_room(config, pools, config.cluster.startup_timeout_s)
        yield
    finally:
        ray.shutdown()


def describe_cluster(config: Config) -> str:
    """What the run asks against the cluster that RAY_ADDRESS or the recipe names, where that answers from here."""
    import ray
    from ray.exceptions import RayError

    address = os.environ.get("RAY_ADDRESS") or config.cluster.address
    if address in (None, "auto"):
        return "its room is checked when the run starts; RAY_ADDRESS=http://HEAD:8265 compares it with a cluster now"
    try:
        if address.startswith(("http://", "https://")):
            return preflight.describe_room(config, preflight.dashboard_nodes(address))
        ray.init(address=find_cluster(config), log_to_driver=False, logging_level=logging.WARNING)
        try:
            return preflight.describe_room(config, preflight.cluster_nodes())
        finally:
            ray.shutdown()
    except (ConfigError, ConnectionError, RuntimeError, RayError) as error:  # RuntimeError: the token is refused
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return f"{reason}\nits room is checked when the run starts"


def find_cluster(config: Config) -> str:
    """Address of the cluster that the run joins; it took a connection (Ray itself waits for minutes).

    Raises `ConfigError` where none answers.
    """
    from ray._private.services import canonicalize_bootstrap_address

    wanted = config.cluster.address or "auto"
    if "://" in wanted:
        return wanted
    try:
        found: str = canonicalize_bootstrap_address(wanted) or wanted
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_DEADLINE_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cluster.address={wanted}: no Ray cluster answers here ({error}); start one (`ray start --head`), submit "
            "the run to one (`softgrpo submit`), or leave cluster.address out for one of its own on this machine"
        ) from None
    return found


def labelled_pools() -> frozenset[str]:
    """Pools for which this cluster has nodes of their own (label `rl/pool`)."""
    return preflight.labels_of(preflight.cluster_nodes())


async def reserve_learner(plan: Plan) -> dict[str, Any]:
    """Ray options of a learner rank inside one placement group: all ranks get their place, or none.

    Raises `DeadlineExceeded` where the cluster has no room within the start-up deadline.
    """
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    options = dict(plan.learner_options)
    bundle = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
    bundles = [{name: amount for name, amount in bundle.items() if amount}] * plan.learner.world_size
    selector = options.pop("label_selector", None)
    selectors = [selector] * len(bundles) if selector else None
    group = placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)
    what = f"a place for {len(bundles)} learner ranks of {bundles[0]} (is the cluster large enough?)"
    await within(group.ready(), plan.learner.startup_timeout_s, what)
    return {**options, "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=group)}
