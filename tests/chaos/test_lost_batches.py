"""A node goes with finished groups that exist nowhere else: they are generated again, the learner stays."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos.faults import balanced
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
STEPS = 40
UNTIL_ALL_SLOTS_ARE_COMPLETE_S = 10.0


def test_a_lost_node_costs_its_batches_not_the_learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_max_direct_call_object_size", "0")  # the batches of a tiny run would travel in messages
    inputs = make_inputs(tmp_path / "inputs")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=1, labels={"rl/pool": "learner"}, object_store_memory=200 * 2**20)
        leaving = _node_for_responses(cluster)
        run = Run(recipe(inputs, tmp_path / "run", cluster__address=cluster.address, steps=STEPS))
        run.wait_for_step(3)
        # While the learner stands still, responses and their grades pile up on the other node.
        workers = _workers("ray::LearnerRank")
        for worker in workers:
            worker.suspend()
        time.sleep(UNTIL_ALL_SLOTS_ARE_COMPLETE_S)
        cluster.remove_node(leaving, allow_graceful=False)
        _node_for_responses(cluster)
        for worker in workers:
            worker.resume()
        assert run.wait() == 0, run.tail()
        counts = balanced(run, STEPS, groups_per_step=4)
    finally:
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
    assert sum(line.get("failures/lost_batches", 0) for line in run.metrics()) >= 4, "whole batches were gone"
    assert counts["requeued"] >= 4
    assert not any(line.get("failures/learner_restarts") for line in run.metrics()), "the learner had to pay"
    assert len(run.metrics()) == STEPS, "no step was repeated"


def _node_for_responses(cluster: Any) -> Any:
    """Room for the rollout actor and, as no node is labelled for verifiers, for the verifier."""
    return cluster.add_node(num_cpus=2, labels={"rl/pool": "rollout"}, object_store_memory=200 * 2**20)


def _workers(title: str) -> list[psutil.Process]:
    """Raylets of a cluster in this process are children of this process, not of the run."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if title in " ".join(child.cmdline())]
