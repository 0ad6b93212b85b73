"""What Ray is told of the cluster that a run starts or joins."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from orchestration import cluster
from tests.orchestration.test_inference_pools import recipe


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ray.init` gets, and for how long room is waited for."""
    seen: dict[str, Any] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: seen.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "num_cpus", lambda: 2)
    monkeypatch.setattr(cluster, "find_cluster", lambda config: config.cluster.address)
    monkeypatch.setattr(cluster.preflight, "require_room", lambda config, pools, seconds: seen.update(room_s=seconds))
    return seen


@pytest.mark.parametrize(("local_cpus", "num_cpus"), [(64, 64), (None, 12)])
def test_a_local_cluster_is_as_large_as_the_recipe_says(
    local_cpus: int | None, num_cpus: int, told: dict[str, Any]
) -> None:
    """By default as large as the pools need it, on a machine that has less."""
    pools = {"rollout": {"num_actors": 5, "num_cpus": 2}, "reward": {"num_cpus": 0.5}, "learner": {"num_cpus": 0.75}}
    place = {"local_cpus": local_cpus, "object_store_mb": 96, "startup_timeout_s": 33}
    with cluster.connected(recipe(cluster=place, **pools)):
        pass
    assert (told["address"], told["num_cpus"], told["object_store_memory"]) == ("local", num_cpus, 96 * 2**20)
    assert told["room_s"] == cluster.LOCAL_ROOM_S


def test_room_is_waited_for_as_long_as_the_recipe_says_where_nodes_may_come(told: dict[str, Any]) -> None:
    with cluster.connected(recipe(cluster={"address": "10.0.0.1:6379", "startup_timeout_s": 33})):
        pass
    assert (told["address"], told["room_s"]) == ("10.0.0.1:6379", 33)
    assert "num_cpus" not in told, "the cluster has the size that it has"
