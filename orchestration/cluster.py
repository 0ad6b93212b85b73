"""Ray for one run: a local cluster where there is none, the job's cluster where there is one."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestration.config import Config, ConfigError
from orchestration.failures import within
from orchestration.machine import num_cpus
from orchestration.plan import POOL_LABEL, Plan, source_path
from orchestration.validate import pool_needs, uses_local_cluster

logger = logging.getLogger(__name__)


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Ray is up inside the block and every actor of this run is gone after it.

    Raises `ConfigError` where an existing cluster is too small for the plan (unless it scales itself).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray logs an environment variable into every worker; the accelerator override is its own future default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
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
            address=config.cluster.address or "auto",
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env=worker_environment,
        )
    try:
        _check_capacity(config)
        yield
    finally:
        ray.shutdown()


def labelled_pools() -> frozenset[str]:
    """Pools for which this cluster has nodes of their own (label `rl/pool`)."""
    import ray

    labels = (node.get("Labels", {}).get(POOL_LABEL) for node in ray.nodes() if node["Alive"])
    return frozenset(label for label in labels if label)


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


def _check_capacity(config: Config) -> None:
    import ray

    needs, total = pool_needs(config), ray.cluster_resources()
    for resource, wanted in (("CPU", needs.cpus), ("GPU", needs.gpus)):
        if wanted > total.get(resource, 0) and not _scales():
            raise ConfigError(
                f"the pools ask for {wanted:g} {resource}s, the cluster has {total.get(resource, 0):g}; lower "
                "rollout.num_actors, learner.world_size or their num_cpus/num_gpus, or add nodes"
            )


def _scales() -> bool:
    """Whether an autoscaler may still add nodes."""
    return os.environ.get("RAY_ENABLE_AUTOSCALER", "0") == "1" or os.environ.get("KUBERAY_AUTOSCALING", "0") == "1"
