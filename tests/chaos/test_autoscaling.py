"""An autoscaler adds the nodes that a run asks for, at its start and when its rollout pool grows, and removes them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from orchestration import scale
from tests.end_to_end.recipes import Run, make_inputs, recipe
from tests.orchestration.ray_head import Head, ray_head

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

STORE = 200 * 2**20


@pytest.fixture
def head() -> Iterator[Head]:
    """A head without processors; each pool has a node of its own, and there may be a second one for engines."""
    node_types = {
        pool: {
            "resources": {"CPU": cpus, "object_store_memory": STORE},
            "labels": {"rl/pool": pool},
            "min_workers": 1,
            "max_workers": most,
        }
        for pool, cpus, most in (("rollout", 1, 2), ("learner", 1, 1), ("verifier", 1, 1))
    }
    with ray_head(node_types=node_types) as started:
        ray.init(address=started.gcs_address, namespace="looking-on", log_to_driver=False)
        try:
            yield started
        finally:
            ray.shutdown()


def test_the_rollout_pool_grows_onto_a_new_node_and_gives_it_back(head: Head, tmp_path: Path) -> None:
    """And a run that is too large for the autoscaler ends with the row that does not fit."""
    inputs = make_inputs(tmp_path / "inputs")
    there = {"cluster__address": head.gcs_address, "cluster__startup_timeout_s": 30}
    too_large = Run(recipe(inputs, tmp_path / "large", learner__world_size=2, **there))
    assert too_large.wait() == 2, too_large.tail()
    assert "the cluster has no room for this run after 30 s" in too_large.tail()
    assert "learner: 2 x (1 CPU) on nodes with rl/pool=learner: the nodes hold 1; lower" in too_large.tail()

    run = Run(recipe(inputs, tmp_path / "run", steps=20_000, checkpoint__every_steps=20_000, **there))
    run.wait_for_step(3)
    assert num_rollout_nodes() == 1
    assert scale.main(["--run", str(run.run_dir), "--rollout", "2"]) == 0
    run.wait_until(lambda: run.metrics()[-1]["pool/rollout_actors"] == 2, "a second rollout actor in service")
    assert num_rollout_nodes() == 2
    assert scale.main(["--run", str(run.run_dir), "--rollout", "1"]) == 0
    run.wait_until(lambda: num_rollout_nodes() == 1, "the idle node to be taken away")
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.tail()
    assert run.metrics()[-1]["failures/rollout_restarts"] == 0, "no actor was lost to the node that went"


def num_rollout_nodes() -> int:
    """Live nodes with the label of the rollout pool."""
    return sum(node["Alive"] and node["Labels"].get("rl/pool") == "rollout" for node in ray.nodes())
