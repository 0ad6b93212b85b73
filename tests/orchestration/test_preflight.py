"""The pre-flight table: who fits where, and what is said about who does not."""

from __future__ import annotations

import time

import pytest

from orchestration.cluster import describe_cluster
from orchestration.config import Config, ConfigError, parse_config
from orchestration.preflight import (
    POOLS,
    NodeRoom,
    cluster_nodes,
    dashboard_nodes,
    demands,
    fit,
    problems,
    require_room,
    table,
)
from tests.orchestration.ray_head import free_ports


def recipe(**sections: object) -> Config:
    tree = {"name": "run", "model": {"path": "model"}, "data": {"train": {"path": "train.jsonl"}}}
    return parse_config(tree | sections, "test")


def node(cpus: float, gpus: float = 0, label: str | None = None, used: float = 0) -> NodeRoom:
    return NodeRoom(cpus, gpus, cpus - used, gpus, label)


GPU_RUN = {
    "rollout": {"num_actors": 2, "num_gpus": 2, "tensor_parallel_size": 2, "num_cpus": 4},
    "learner": {"world_size": 4, "num_gpus": 1, "num_cpus": 4},
    "reward": {"num_actors": 2, "num_cpus": 2},
}


def placed(config: Config, nodes: list[NodeRoom], labelled: tuple[str, ...] = ()) -> dict[str, int]:
    return {row.demand.pool: row.placed for row in fit(demands(config, labelled), nodes)}


def test_everything_fits() -> None:
    assert placed(recipe(**GPU_RUN), [node(64, 8)]) == {"learner": 4, "rollout": 2, "verifier": 2}


def test_an_engine_is_whole_on_one_node() -> None:
    """Four nodes with one GPU each have 4 GPUs, and no place for an engine of 2."""
    alone = {**GPU_RUN, "learner": {"world_size": 1, "num_cpus": 1}}
    assert placed(recipe(**alone), [node(16, 1)] * 4)["rollout"] == 0
    assert placed(recipe(**alone), [node(16, 2)] * 2)["rollout"] == 2


def test_a_labelled_pool_uses_its_own_nodes_only() -> None:
    config = recipe(rollout={"num_actors": 3}, reward={"num_actors": 1, "num_cpus": 1})
    nodes = [node(1, label="rollout"), node(16)]
    assert placed(config, nodes, ("rollout",))["rollout"] == 1
    assert placed(config, nodes)["rollout"] == 3


def test_shares_of_a_gpu_do_not_straddle_two_devices() -> None:
    config = recipe(rollout={"num_actors": 3, "num_gpus": 0.6}, learner={"num_gpus": 0.4})
    assert placed(config, [node(16, 2)]) == {"learner": 1, "rollout": 2, "verifier": 1}


def test_processors_of_gpu_nodes_are_left_to_those_who_need_the_gpus() -> None:
    config = recipe(rollout={"num_actors": 1, "num_gpus": 1, "num_cpus": 4}, reward={"num_actors": 4, "num_cpus": 1})
    assert placed(config, [node(5, 1), node(4)]) == {"learner": 1, "rollout": 1, "verifier": 4}


def test_the_table_names_pools_labels_and_nodes() -> None:
    config, nodes = recipe(**GPU_RUN), [node(32, 4, "rollout"), node(32, 4, "learner"), node(0)]
    text = table(fit(demands(config, ("rollout", "learner")), nodes), nodes)
    assert "rollout   2       4 CPU, 2 GPU  rl/pool=rollout  2    2" in text
    assert "verifier  2       2 CPU         any node         2    2" in text
    assert "1 x 32 CPU 4 GPU (rl/pool=rollout)" in text


@pytest.mark.parametrize(
    ("nodes", "messages"),
    [
        ([node(64, 8)], []),
        (
            [node(64, 6)],
            ["learner: 4 x (4 CPU, 1 GPU): the nodes hold 2; lower learner.world_size, learner.num_cpus or"],
        ),
        (
            [NodeRoom(64, 8, 64, 4)],
            ["learner: 4 x (4 CPU, 1 GPU): there is room for 0 beside what other jobs hold; wait for them"],
        ),
    ],
)
def test_the_row_that_does_not_fit_is_named_with_its_fix(nodes: list[NodeRoom], messages: list[str]) -> None:
    found = problems(fit(demands(recipe(**GPU_RUN), ()), nodes))
    assert len(found) == len(messages)
    for text, start in zip(found, messages, strict=True):
        assert text.startswith(start)


@pytest.mark.slow
def test_ray_answers_within_the_deadline_and_keeps_nothing(ray_local: None) -> None:
    """On a cluster of 8 CPUs: 5 are granted again and again, 11 are refused with the table."""
    for _ in range(3):
        require_room(recipe(rollout={"num_actors": 4}, reward={"num_cpus": 0}), POOLS, 5)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"no room for this run after 2 s\n") as caught:
        require_room(recipe(rollout={"num_actors": 10}), POOLS, 2)
    assert time.monotonic() - started < 10
    assert "nodes: 1 x 8 CPU" in str(caught.value)
    assert "rollout: 10 x (1 CPU): the nodes hold 7; lower rollout.num_actors" in str(caught.value)
    assert sum(node.cpus for node in cluster_nodes()) == 8
    require_room(recipe(), ("rollout", "verifier"), 5)


def test_a_dashboard_that_is_gone_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's error for it is no RayError."""
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    with pytest.raises(ConfigError, match="the dashboard does not list its nodes"):
        dashboard_nodes(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    text = describe_cluster(recipe())
    assert text.startswith(f"{address}: the dashboard does not list") and "checked when the run starts" in text
