"""Recipes that the KubeRay tests render: one on CPUs, one on GPUs with tensor parallelism and a large verifier pool."""

from __future__ import annotations

import functools
from pathlib import Path

from orchestration.config import Config, parse_config
from orchestration.kuberay_schema import Node, from_crd

BASE = {"model": {"path": "models/policy"}, "data": {"train": {"path": "data/train.parquet"}}}


def cpu_recipe(**sections: object) -> Config:
    return parse_config({"name": "Demo_Run.1", **BASE, "rollout": {"num_actors": 2}, **sections}, "cpu recipe")


def gpu_recipe(**sections: object) -> Config:
    tree = {
        "name": "qwen-7b",
        **BASE,
        "rollout": {"num_actors": 4, "num_gpus": 2, "tensor_parallel_size": 2, "num_cpus": 4},
        "learner": {"world_size": 16, "num_gpus": 1, "num_cpus": 4, "zero_stage": 3},
        "reward": {"num_actors": 20, "processes_per_actor": 2},
    }
    return parse_config(tree | sections, "gpu recipe")


@functools.cache
def full_definitions(shared_dir: Path, release: str) -> dict[str, Node]:
    """RayJob and RayCluster as the full definitions of one release describe them; a second to read, so read once."""
    nodes: dict[str, Node] = {}
    for plural in ("rayjobs", "rayclusters"):
        nodes |= from_crd(shared_dir / "crd" / f"ray.io_{plural}.{release}.yaml.gz")
    return nodes
