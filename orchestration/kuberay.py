"""Kubernetes manifests from the same configuration as a local run: RayJob (or RayCluster), ConfigMap, NetworkPolicy.

    config.rollout  -> worker group "rollout",  label rl/pool: rollout,  one pod per engine
    config.learner  -> worker group "learner",  label rl/pool: learner,  as many ranks per pod as a node has GPUs
    config.reward   -> worker group "verifier", label rl/pool: verifier, up to 8 actors per pod
    head            -> driver, GCS, dashboard; num-cpus "0", so no actor lands there

The image carries dependencies, `working_dir` the code, the ConfigMap the resolved configuration, a shared volume
(ReadWriteMany claim) the run directory: a retry of the RayJob makes a new cluster and resumes from there. Fields are
those of KubeRay v1.5.2; everything newer is an overlay in `configs/kuberay/`. Output is deterministic (golden files).
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from orchestration.config import Config, ConfigError, dump_config
from orchestration.kuberay_manifest import Manifest
from orchestration.kuberay_names import OBJECT_NAME, SHORT_NAME, is_object_name, is_short_name
from orchestration.kuberay_shutdown import (
    DRAIN_VARIABLE,
    HEAD_DRAIN_S,
    STOP_SCRIPT,
    STOP_WAIT_VARIABLE,
    ShutdownDeadlines,
    shutdown_deadlines,
)

RAY_VERSION = "2.60.0"
VERIFIERS_PER_POD = 8
NAME_LIMIT = 40
"""Seven under KubeRay's limit for RayJob: the ConfigMap and NetworkPolicy add a suffix."""
CONFIG_DIR = "/etc/softgrpo"
POOLS = ("learner", "rollout", "verifier")
"""Order of the worker groups; overlays address them by index and test the name."""
ROLLOUT_CEILING = 16
"""Pods up to which the rollout group may grow; counts with the overlay `autoscaling` only."""


@dataclass(frozen=True)
class ClusterShape:
    """What a cluster needs to know beyond the configuration."""

    kind: Literal["RayJob", "RayCluster"] = "RayJob"
    namespace: str | None = None
    image: str | None = None
    """Image of head, submitter, learner and rollout pods; None: `softgrpo:cuda` with GPUs in a pool, else the next."""
    verifier_image: str = "softgrpo:cpu"
    """Image of verifier pods (same Ray and Python as the other)."""
    claim: str = "softgrpo-shared"
    """Existing ReadWriteMany claim for the run directory, models and the code archive."""
    mount: str = "/mnt/softgrpo"
    working_dir: str | None = None
    """URI of the code; None: `code.zip` on the shared volume."""
    gpus_per_node: int = 8
    memory: dict[str, str] = field(default_factory=dict)
    """Pool (or head) -> memory per pod, where the estimate does not fit."""
    backoff_limit: int = 3
    deadline_s: int = 7 * 24 * 3600


@dataclass(frozen=True)
class PodSize:
    """Pods of one pool."""

    pool: str
    replicas: int
    cpus: float
    gpus: int
    memory: str


def render(config: Config, shape: ClusterShape) -> list[Manifest]:
    """All documents, in the order in which to apply them. Raises `ConfigError` where pods cannot express the pools."""
    _check_options(shape)
    name = kubernetes_name(config.name)
    sizes = pod_sizes(config, shape)
    if shape.image is None:
        shape = replace(shape, image="softgrpo:cuda" if any(size.gpus for size in sizes) else shape.verifier_image)
    stop = shutdown_deadlines(config)
    cluster = _ray_cluster_spec(sizes, shape, name, stop)
    metadata = _metadata(name, shape)
    settings: Manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(f"{name}-config", shape, name),
        "data": {"config.yaml": dump_config(_on_shared_volume(config, shape)), STOP_SCRIPT: _stop_script()},
    }
    if shape.kind == "RayCluster":
        workload: Manifest = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": cluster}
    else:
        spec = {**_job_spec(config, shape, name, stop), "rayClusterSpec": cluster}
        workload = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}
    return [settings, _network_policy(name, shape), workload]


def _check_options(shape: ClusterShape) -> None:
    if not PurePosixPath(shape.mount).is_absolute():
        raise ConfigError(f"--mount {shape.mount}: give an absolute path")
    if shape.namespace is not None and not is_short_name(shape.namespace):
        raise ConfigError(f"--namespace {shape.namespace!r}: must be {SHORT_NAME}")
    if not is_object_name(shape.claim):
        raise ConfigError(f"--claim {shape.claim!r}: must be {OBJECT_NAME}")
    if shape.deadline_s <= 0:
        raise ConfigError(f"--deadline-s {shape.deadline_s}: must be positive; it counts for all retries together")


def to_yaml(documents: list[Manifest]) -> str:
    """Multi-document YAML; texts of several lines as blocks."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)
    return text


def kubernetes_name(name: str) -> str:
    """The run name as a DNS-1035 label; one that is not such a label gets a digest, so two runs never share one."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"run-{label}".rstrip("-")
    if label == name and len(label) <= NAME_LIMIT:
        return label
    return f"{label[: NAME_LIMIT - 7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def pod_sizes(config: Config, shape: ClusterShape) -> list[PodSize]:
    """Pool sizes as pods: an actor never spans pods, and a pod never asks more GPUs than a node has."""
    return [_learner_pods(config, shape), _rollout_pods(config, shape), _verifier_pods(config, shape)]


def _learner_pods(config: Config, shape: ClusterShape) -> PodSize:
    learner = config.learner
    if learner.num_gpus % 1:
        raise ConfigError(
            f"learner.num_gpus={learner.num_gpus}: Kubernetes gives pods whole GPUs, and the learner and the rollout "
            "pool are pods of their own; set learner.num_gpus: 1 and rollout.num_gpus: 1, or run the colocated recipe "
            "on one node with `softgrpo train`"
        )
    per_rank = int(learner.num_gpus)
    if per_rank > shape.gpus_per_node:
        raise ConfigError(f"learner.num_gpus={per_rank} per rank exceeds --gpus-per-node {shape.gpus_per_node}")
    ranks_per_pod = min(learner.world_size, shape.gpus_per_node // per_rank if per_rank else learner.world_size)
    if learner.world_size % ranks_per_pod:
        raise ConfigError(
            f"learner.world_size={learner.world_size} does not fill pods of {ranks_per_pod} ranks "
            f"(--gpus-per-node {shape.gpus_per_node}, num_gpus {per_rank}); set world_size to a multiple of it"
        )
    gpus = ranks_per_pod * per_rank
    memory = shape.memory.get("learner", f"{64 * gpus}Gi" if gpus else f"{4 * ranks_per_pod}Gi")
    return PodSize("learner", learner.world_size // ranks_per_pod, ranks_per_pod * learner.num_cpus, gpus, memory)


def _rollout_pods(config: Config, shape: ClusterShape) -> PodSize:
    rollout = config.rollout
    engines_per_pod, gpus = 1, 0
    if 0 < rollout.num_gpus < 1:
        engines_per_pod, gpus = min(int(1 / rollout.num_gpus), rollout.num_actors), 1
    elif rollout.num_gpus:
        gpus = max(int(rollout.num_gpus), rollout.tensor_parallel_size)
    if gpus > shape.gpus_per_node:
        raise ConfigError(
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size} needs {gpus} GPUs in one pod, more than "
            f"--gpus-per-node {shape.gpus_per_node}"
        )
    replicas = math.ceil(rollout.num_actors / engines_per_pod)
    memory = shape.memory.get("rollout", f"{64 * gpus}Gi" if gpus else "8Gi")
    return PodSize("rollout", replicas, engines_per_pod * rollout.num_cpus, gpus, memory)


def _verifier_pods(config: Config, shape: ClusterShape) -> PodSize:
    reward = config.reward
    actors_per_pod = min(reward.num_actors, VERIFIERS_PER_POD)
    children_mb = actors_per_pod * reward.processes_per_actor * reward.memory_mb
    memory = shape.memory.get("verifier", f"{math.ceil(children_mb / 1024) + 1 + actors_per_pod}Gi")
    cpus = max(actors_per_pod * reward.num_cpus, 1.0)
    return PodSize("verifier", math.ceil(reward.num_actors / actors_per_pod), cpus, 0, memory)


def _stop_script() -> str:
    return Path(__file__).with_name("kuberay_stop.py").read_text(encoding="utf-8")


def _on_shared_volume(config: Config, shape: ClusterShape) -> Config:
    """The configuration with a run directory that outlives the cluster."""
    directory = PurePosixPath(config.output_dir) if config.output_dir else PurePosixPath("outputs") / config.name
    if not directory.is_absolute():
        directory = PurePosixPath(shape.mount) / directory
    if ".." in directory.parts or not directory.is_relative_to(shape.mount):
        raise ConfigError(
            f"output_dir={config.output_dir} is not on the shared volume {shape.mount}: a retry on a new cluster could "
            f"not resume from it; set output_dir: {shape.mount}/outputs/{config.name}, or give --mount"
        )
    return config.model_copy(update={"output_dir": str(directory)})


def _job_spec(config: Config, shape: ClusterShape, name: str, stop: ShutdownDeadlines) -> Manifest:
    environment = {
        "working_dir": shape.working_dir or f"file://{shape.mount}/code.zip",
        "env_vars": {"PYTHONUNBUFFERED": "1", STOP_WAIT_VARIABLE: str(stop.job_stop_wait_s)},
        "config": {"setup_timeout_seconds": 600},
    }
    return {
        # One word each: the submitter's shell sees this line before the driver's does.
        "entrypoint": f"python -m orchestration train --config {CONFIG_DIR}/config.yaml --auto-resume",
        "runtimeEnvYAML": yaml.safe_dump(environment, sort_keys=False),
        "metadata": {"softgrpo_run": config.name, "softgrpo_config": config_digest(config)},
        "submissionMode": "K8sJobMode",
        "backoffLimit": shape.backoff_limit,
        "activeDeadlineSeconds": shape.deadline_s,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "submitterConfig": {"backoffLimit": 2},
        "submitterPodTemplate": _submitter(shape, name, stop),
    }


def config_digest(config: Config) -> str:
    """First 12 hex digits of the SHA-256 of the resolved configuration."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:12]


def _ray_cluster_spec(sizes: list[PodSize], shape: ClusterShape, name: str, stop: ShutdownDeadlines) -> Manifest:
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _head(shape, name, stop),
        },
        "workerGroupSpecs": [_worker_group(size, shape, name, stop) for size in sizes],
    }


def _worker_group(size: PodSize, shape: ClusterShape, name: str, stop: ShutdownDeadlines) -> Manifest:
    image = shape.verifier_image if size.pool == "verifier" else shape.image
    resources = _resources(size.cpus, size.memory, size.gpus)
    container = _container("ray-worker", image, resources, shape, stop.worker_drain_s)
    container["livenessProbe"] = _probe(52365, "/api/local_raylet_healthz", period_s=10, failures=60)
    container["readinessProbe"] = _probe(52365, "/api/local_raylet_healthz", period_s=5, failures=10)
    if size.pool == "verifier":
        container["volumeMounts"][0]["readOnly"] = True  # it needs the code archive and judges untrusted text
    template = _pod(container, shape, name, size.pool, stop)
    template["spec"] |= {"nodeSelector": {}, "tolerations": []}  # overlays append to them
    return {
        "groupName": size.pool,
        "replicas": size.replicas,
        "minReplicas": size.replicas,
        "maxReplicas": max(size.replicas, ROLLOUT_CEILING) if size.pool == "rollout" else size.replicas,
        "labels": {"rl/pool": size.pool},
        "rayStartParams": {},
        "template": template,
    }


def _head(shape: ClusterShape, name: str, stop: ShutdownDeadlines) -> Manifest:
    memory = shape.memory.get("head", "16Gi")
    container = _container("ray-head", shape.image, _resources(4, memory, 0), shape, HEAD_DRAIN_S)
    container["envFrom"] = []  # overlays append secrets that only the driver needs
    container["ports"] = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "client", "containerPort": 10001},
        {"name": "metrics", "containerPort": 8080},
    ]
    command = ["python", f"{CONFIG_DIR}/{STOP_SCRIPT}", "http://127.0.0.1:8265", str(stop.head_stop_s)]
    container["lifecycle"] = {"preStop": {"exec": {"command": command}}}
    container["livenessProbe"] = _probe(52365, "/api/local_raylet_healthz", period_s=10, failures=60)
    container["readinessProbe"] = _probe(8265, "/api/gcs_healthz", period_s=5, failures=10)
    container["volumeMounts"].append({"name": "config", "mountPath": CONFIG_DIR, "readOnly": True})
    template = _pod(container, shape, name, "head", stop)
    template["spec"]["volumes"].append({"name": "config", "configMap": {"name": f"{name}-config"}})
    return template


def _submitter(shape: ClusterShape, name: str, stop: ShutdownDeadlines) -> Manifest:
    container = {
        "name": "ray-job-submitter",
        "image": shape.image,
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": _container_security(),
    }
    template = _pod(container, shape, name, "submitter", stop)
    template["spec"]["restartPolicy"] = "Never"
    template["spec"]["volumes"] = []
    return template


def _container(name: str, image: str | None, resources: Manifest, shape: ClusterShape, drain_s: int) -> Manifest:
    return {
        "name": name,
        "image": image,
        "env": [
            {"name": DRAIN_VARIABLE, "value": str(drain_s)},
            {"name": "RAY_LOGGING_CONFIG_ENCODING", "value": "JSON"},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            {"name": "VLLM_NO_USAGE_STATS", "value": "1"},
            {"name": "HF_HOME", "value": f"{shape.mount}/huggingface"},
        ],
        "resources": resources,
        "securityContext": _container_security(),
        "volumeMounts": [{"name": "shared", "mountPath": shape.mount}],
    }


def _pod(container: Manifest, shape: ClusterShape, name: str, pool: str, stop: ShutdownDeadlines) -> Manifest:
    return {
        "metadata": {"labels": {**_labels(name), "softgrpo/pool": pool}},
        "spec": {
            "terminationGracePeriodSeconds": stop.pod_grace_s,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "fsGroup": 1000,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": shape.claim}}],
        },
    }


def _container_security() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _resources(cpus: float, memory: str, gpus: int) -> Manifest:
    """Requests equal limits: the operator derives Ray's resources from the limits."""
    amounts: Manifest = {"cpu": str(math.ceil(cpus)), "memory": memory}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": dict(amounts), "limits": amounts}


def _probe(port: int, path: str, *, period_s: int, failures: int) -> Manifest:
    """Ray answers these paths without a token."""
    return {
        "httpGet": {"path": path, "port": port},
        "initialDelaySeconds": 30,
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "softgrpo", "app.kubernetes.io/instance": name}


def _metadata(object_name: str, shape: ClusterShape, instance: str | None = None) -> Manifest:
    metadata: Manifest = {"name": object_name, "labels": _labels(instance or object_name)}
    if shape.namespace:
        metadata["namespace"] = shape.namespace
    return metadata


def _network_policy(name: str, shape: ClusterShape) -> Manifest:
    """Whoever reaches Ray's ports owns the cluster: only its own pods and the operator (which polls the job) may."""
    own = {"podSelector": {"matchLabels": _labels(name)}}
    anywhere: Manifest = {"namespaceSelector": {}}
    operator = {**anywhere, "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(f"{name}-network", shape, name),
        "spec": {
            "podSelector": {"matchLabels": _labels(name)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own]},
                {"from": [operator], "ports": [{"port": 8265, "protocol": "TCP"}]},
            ],
            "egress": [
                {"to": [own]},
                {
                    "to": [anywhere],
                    "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}],
                },
                {"ports": [{"port": 443, "protocol": "TCP"}]},
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """No aliases, and `|` blocks for texts of several lines."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
