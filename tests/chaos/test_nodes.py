"""Nodes that are lost without a word (fault matrix row 12), on a local cluster of several."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from orchestration.run_state import RunDirectory, load_state
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

NOTICED_S = 60.0
"""Five health checks a second apart, and Ray telling everybody, on a machine that is busy with eight processes."""
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 5,
}


@contextmanager
def cluster_of(**nodes: int) -> Iterator[tuple[Cluster, dict[str, list[Any]]]]:
    """A head without work and so many nodes with one CPU for each pool; the nodes by pool."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": HEALTH_CHECKS})
    try:
        yield cluster, {pool: [add(cluster, pool) for _ in range(count)] for pool, count in nodes.items()}
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)


def add(cluster: Cluster, pool: str) -> Any:
    return cluster.add_node(num_cpus=1, labels={"rl/pool": pool}, object_store_memory=100 * 2**20)


def node_with(actor_class: str, nodes: list[Any]) -> Any:
    """The one of these nodes where an actor of that class lives."""
    homes = {
        actor["Address"]["NodeID"]
        for actor in ray._private.state.actors().values()
        if actor["ActorClassName"] == actor_class and actor["State"] == "ALIVE"
    }
    return next(node for node in nodes if node.node_id in homes)


def test_a_rollout_node_and_the_learners_node_are_lost(tmp_path: Path) -> None:
    """The run goes on with the other rollout actor, takes the node that comes instead, and moves its learner."""
    inputs = make_inputs(tmp_path / "inputs")
    with cluster_of(rollout=2, verifier=1, learner=2) as (cluster, nodes):
        config = recipe(
            inputs,
            tmp_path / "run",
            cluster__address=cluster.address,
            rollout__num_actors=2,
            steps=5000,
            checkpoint__every_steps=5,
            # Batches must lie in the node's store, not in the driver's message.
            algorithm__group_size=16,
            sampling__max_new_tokens=64,
            sampling__max_thinking_tokens=48,
        )
        run = Run(config)
        run.wait_until(lambda: RunDirectory(run.run_dir).latest_checkpoint() is not None, "a first checkpoint")
        ray.init(address=cluster.address, namespace="looking-on", log_to_driver=False)

        cluster.remove_node(node_with("RolloutActor", nodes["rollout"]), allow_graceful=False)
        started = time.monotonic()
        run.wait_until(lambda: run.metrics()[-1]["pool/rollout_actors"] == 1, "the loss to be noticed", NOTICED_S)
        noticed_s = time.monotonic() - started
        reached = len(run.metrics())
        run.wait_for_step(reached + 3)
        add(cluster, "rollout")
        run.wait_until(lambda: run.metrics()[-1]["pool/rollout_actors"] == 2, "an actor on the node that came")

        cluster.remove_node(node_with("LearnerRank", nodes["learner"]), allow_graceful=False)
        run.wait_until(lambda: run.metrics()[-1]["failures/learner_restarts"] >= 1, "the learner on its other node")
        reached = len(run.metrics())
        run.wait_for_step(reached + 3)
        run.process.terminate()
        assert run.wait() == 75, run.tail()

    checkpoint = RunDirectory(run.run_dir).latest_checkpoint()
    assert checkpoint is not None
    state = load_state(checkpoint)
    assert state.counts["trained"] == 4 * state.step, "a step trained less or more than its batch"
    assert len(state.pending) == len(set(state.pending))
    lines = run.metrics()
    steps = [line["step"] for line in lines]
    assert set(steps) == set(range(1, max(steps) + 1))
    assert len(steps) - len(set(steps)) <= 5, "more than checkpoint.every_steps steps were repeated"
    assert all(line["staleness/max"] <= 1 for line in lines)
    assert lines[-1]["failures/learner_restarts"] == 1, "it was sent to the node that is gone"
    assert noticed_s < NOTICED_S
