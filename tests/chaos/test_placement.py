"""Pools go to the nodes that are labelled for them, on a local cluster of four nodes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.chaos.faults import balanced
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
POOL_OF_ACTOR = {"RolloutActor": "rollout", "VerifierActor": "verifier", "LearnerRank": "learner"}


def test_every_actor_is_on_a_node_of_its_pool(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for pool in ("rollout", "verifier", "learner"):
            cluster.add_node(num_cpus=4, labels={"rl/pool": pool}, object_store_memory=200 * 2**20)
        config = recipe(inputs, tmp_path / "run", cluster__address=cluster.address, learner__world_size=2, steps=60)
        run = Run(config)
        run.wait_for_step(2)
        ray.init(address=cluster.address, namespace="looking-on")
        labels = {node["NodeID"]: node["Labels"].get("rl/pool") for node in ray.nodes()}
        found = {}
        for actor in ray._private.state.actors().values():
            name = actor["ActorClassName"]
            if name in POOL_OF_ACTOR and actor["State"] == "ALIVE":
                found.setdefault(name, set()).add(labels[actor["Address"]["NodeID"]])
        ray.shutdown()
        assert found == {name: {pool} for name, pool in POOL_OF_ACTOR.items()}
        assert run.wait() == 0, run.tail()
        balanced(run, 60, groups_per_step=4)
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
