"""Draining nodes: who is told, once, with the time that is left; and that Ray still tells us."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.draining import DrainWatcher, Resident

ROOT = Path(__file__).resolve().parents[2]


def test_every_resident_of_a_draining_node_is_told_once() -> None:
    told: list[tuple[str, float]] = []
    residents = [
        Resident(name, node, lambda seconds, name=name: told.append((name, seconds)))  # type: ignore[misc]
        for name, node in (("rollout 0", "a"), ("rollout 1", "b"), ("learner rank 0", "b"))
    ]
    watcher = DrainWatcher(lambda: residents)
    watcher.look({})
    watcher.look({"b": 20.0})
    watcher.look({"b": 17.0})
    assert told == [("rollout 1", 20.0), ("learner rank 0", 20.0)]
    assert watcher.num_drained == 2


def test_a_replacement_on_another_draining_node_is_told_too() -> None:
    told: list[str] = []
    nodes = ["a"]
    watcher = DrainWatcher(lambda: [Resident("rollout 0", nodes[0], lambda seconds: told.append(nodes[0]))])
    watcher.look({"a": 20.0, "b": 20.0})
    nodes[0] = "b"
    watcher.look({"a": 20.0, "b": 20.0})
    assert told == ["a", "b"]


def test_a_drain_is_noticed_within_a_poll() -> None:
    told = asyncio.Event()
    states = iter([{}, {}, {"a": 5.0}])

    async def run() -> None:
        watcher = DrainWatcher(
            lambda: [Resident("driver", "a", lambda seconds: told.set())],
            draining=lambda: next(states, {"a": 5.0}),
            poll_s=0.01,
        )
        task = asyncio.create_task(watcher.watch())
        async with asyncio.timeout(5):
            await told.wait()
        task.cancel()

    asyncio.run(run())


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


@pytest.mark.slow
@pytest.mark.chaos
def test_ray_tells_of_a_draining_node() -> None:
    """A contract test of the private calls, in a driver of its own with a cluster of two nodes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", DRIVER], env=environment, capture_output=True, text=True, timeout=180)
    assert done.stdout.strip() == "told", done.stderr[-3000:]
