"""A draining node, on a real cluster of two: Ray tells us, and a run stops with a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import time
import ray
from ray.cluster_utils import Cluster
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
from orchestration.draining import draining_nodes, node_of, own_node

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
leaving = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)

@ray.remote(num_cpus=1)
class Actor:
    def ping(self):
        return ray.get_runtime_context().get_node_id()

actor = Actor.remote()
where = ray.get(actor.ping.remote(), timeout=60)
assert node_of(actor) == where == leaving.node_id, (node_of(actor), where)
assert own_node() != where
assert draining_nodes() == {}
accepted, reason = GcsClient(cluster.gcs_address).drain_node(
    where, autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "preempted", int((time.time() + 20) * 1000))
assert accepted, reason
deadline = time.monotonic() + 15
while not draining_nodes():
    assert time.monotonic() < deadline
    time.sleep(0.2)
((node, seconds),) = draining_nodes().items()
assert node == where and 0 < seconds <= 20, (node, seconds)
assert ray.get(actor.ping.remote(), timeout=30) == where, "a draining node still serves"
print("told", flush=True)
"""


def test_ray_tells_of_a_draining_node() -> None:
    """A contract test of the private calls, in a driver of its own with a cluster of two nodes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", DRIVER], env=environment, capture_output=True, text=True, timeout=180)
    assert done.stdout.strip() == "told", done.stderr[-3000:]


def test_a_learner_node_that_goes_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    """Row 13: the preemption notice of the node of all actors reaches the run, which leaves 75 and a checkpoint."""
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster
    from ray.core.generated import autoscaler_pb2

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        leaving = cluster.add_node(num_cpus=8)
        inputs = make_inputs(tmp_path / "inputs")
        run = Run(recipe(inputs, tmp_path / "run", steps=5000, cluster__address=cluster.address))
        run.wait_for_step(3)
        accepted, reason = GcsClient(cluster.gcs_address).drain_node(
            leaving.node_id,
            autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
            "preempted",
            int((time.time() + 40) * 1000),
        )
        assert accepted, reason
        assert run.wait(40) == 75, run.tail()
        assert "learner rank 0: its node" in run.tail()
        steps = len(run.metrics())
        assert (run.run_dir / "checkpoints" / f"step_{steps:06d}" / "manifest.json").is_file()
    finally:
        cluster.shutdown()
