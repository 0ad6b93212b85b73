"""Where things stand in a RayJob or RayCluster manifest; for the rules, on what has the right structure already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from orchestration import strict_yaml

Manifest = dict[str, Any]


def metadata_of(manifest: Manifest) -> Manifest:
    """The object's metadata."""
    return manifest.get("metadata") or {}


def job_spec(manifest: Manifest) -> Manifest:
    """The spec of a RayJob; empty for a RayCluster."""
    return (manifest.get("spec") or {}) if manifest["kind"] == "RayJob" else {}


def cluster_spec(manifest: Manifest) -> tuple[Manifest, str]:
    """The RayClusterSpec and its path; empty for a job that selects an existing cluster."""
    spec = manifest.get("spec") or {}
    if manifest["kind"] == "RayCluster":
        return spec, "spec"
    return spec.get("rayClusterSpec") or {}, "spec.rayClusterSpec"


def groups(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """(path, group) of the head and of every worker group."""
    cluster, path = cluster_spec(manifest)
    if cluster.get("headGroupSpec"):
        yield f"{path}.headGroupSpec", cluster["headGroupSpec"]
    yield from worker_groups(manifest)


def worker_groups(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """(path, group) of every worker group."""
    cluster, path = cluster_spec(manifest)
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        yield f"{path}.workerGroupSpecs[{index}]", group


def pods(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """(path, pod spec) of every group."""
    for path, group in groups(manifest):
        yield f"{path}.template.spec", (group.get("template") or {}).get("spec") or {}


def ray_container(pod: Manifest) -> Manifest:
    """The first container of a pod, which is Ray's; empty where there is none."""
    container: Manifest = (pod.get("containers") or [{}])[0]
    return container


def environment(pod: Manifest) -> Manifest:
    """Variables of Ray's container."""
    return {entry.get("name"): entry.get("value", "") for entry in ray_container(pod).get("env") or []}


def head_environment(cluster: Manifest) -> Manifest:
    """Variables of Ray's container on the head."""
    return environment(((cluster.get("headGroupSpec") or {}).get("template") or {}).get("spec") or {})


def runtime_environment(manifest: Manifest) -> Manifest:
    """`runtimeEnvYAML` of a RayJob, read; raises ValueError with what is wrong.

    The API server sees a string only: a broken one fails when the job is submitted.
    """
    text = job_spec(manifest).get("runtimeEnvYAML")
    try:
        tree = strict_yaml.load(text) if text else None
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise ValueError(f"expected keys and values, found {type(tree).__name__}")
    variables = (tree or {}).get("env_vars")
    if not isinstance(variables, dict | None):
        raise ValueError(f"env_vars: expected names and values, found {type(variables).__name__}")
    return tree or {}
