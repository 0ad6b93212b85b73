"""Rules of the KubeRay operator that no schema expresses.

Each rule is a generator over one manifest. `OPERATOR_RULES` are what the operator (v1.5 to v1.7, `validation.go`)
refuses, or changes in silence: the API server would take the manifest and it would never run as written. `ADVICE` is
what it accepts and we would regret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from orchestration.kuberay_manifest import (
    Manifest,
    cluster_spec,
    groups,
    head_environment,
    job_spec,
    metadata_of,
    pods,
    runtime_environment,
    worker_groups,
)
from orchestration.kuberay_names import claims_are_named
from orchestration.kuberay_schema import Problem
from orchestration.kuberay_shutdown import shutdown_deadlines_are_ordered

DNS_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
NAME_LIMITS = {"RayJob": 47, "RayCluster": 53}
LABEL_NAME = re.compile(r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
FT_ANNOTATIONS = ("ray.io/ft-enabled", "ray.io/external-storage-namespace")
KUEUE_LABEL = "kueue.x-k8s.io/queue-name"
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
OLDEST_RAY_WITH_TOKENS = (2, 52)
Rule = Callable[[Manifest], Iterator[Problem]]


def name_is_short_dns_label(manifest: Manifest) -> Iterator[Problem]:
    """Rule 1: names become parts of Service and Pod names."""
    name, limit = metadata_of(manifest).get("name") or "", NAME_LIMITS[manifest["kind"]]
    if len(name) > limit:
        yield Problem("metadata.name", f"{name!r} has {len(name)} characters; at most {limit} are allowed")
    if not DNS_1035.match(name):
        yield Problem(
            "metadata.name", f"{name!r} must be lower case letters, digits and dashes, and start with a letter"
        )


def suspension_needs_shutdown(manifest: Manifest) -> Iterator[Problem]:
    """Rule 2: suspending (and Kueue, which suspends) deletes the cluster, so the job must own it."""
    if manifest["kind"] != "RayJob":
        return
    spec = job_spec(manifest)
    queued = KUEUE_LABEL in (metadata_of(manifest).get("labels") or {})
    if not spec.get("suspend") and not queued:
        return
    why = "spec.suspend" if spec.get("suspend") else f"label {KUEUE_LABEL}"
    if not spec.get("shutdownAfterJobFinishes"):
        yield Problem("spec.shutdownAfterJobFinishes", f"must be true with {why}")
    if spec.get("clusterSelector"):
        yield Problem("spec.clusterSelector", f"cannot be combined with {why}; let the job make its own cluster")


def deletion_rules_stand_alone(manifest: Manifest) -> Iterator[Problem]:
    """Rule 3: deletion rules exclude the older ways of cleaning up, and must be consistent among themselves."""
    spec = job_spec(manifest)
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules = strategy.get("deletionRules") or []
    legacy = [name for name in ("onSuccess", "onFailure") if strategy.get(name)]
    path = "spec.deletionStrategy"
    if not rules and len(legacy) != 2:
        yield Problem(path, "give deletionRules, or both onSuccess and onFailure")
    if rules and legacy:
        yield Problem(path, f"deletionRules cannot be combined with {' and '.join(legacy)}")
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield Problem(f"{path}.deletionRules", "cannot be combined with spec.shutdownAfterJobFinishes: true")
    if rules and spec.get("ttlSecondsAfterFinished"):
        yield Problem(f"{path}.deletionRules", "cannot be combined with spec.ttlSecondsAfterFinished")
    yield from _rule_conditions(rules, f"{path}.deletionRules")
    autoscaling = (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    policies = [rule.get("policy") for rule in rules] + [strategy[name].get("policy") for name in legacy]
    for policy in policies:
        if spec.get("clusterSelector") and policy in ("DeleteCluster", "DeleteWorkers"):
            yield Problem(path, f"{policy} is not supported with clusterSelector")
        if autoscaling and policy == "DeleteWorkers":
            yield Problem(path, "DeleteWorkers is not supported with autoscaling")


def _rule_conditions(rules: list[Manifest], path: str) -> Iterator[Problem]:
    seen: dict[str, dict[str, int]] = {}
    for index, rule in enumerate(rules):
        condition = rule.get("condition") or {}
        given = [condition[name] for name in ("jobStatus", "jobDeploymentStatus") if condition.get(name)]
        if len(given) != 1:
            yield Problem(f"{path}[{index}].condition", "give exactly one of jobStatus and jobDeploymentStatus")
            continue
        delays = seen.setdefault(given[0], {})
        delay = condition.get("ttlSeconds") or 0
        if delay < 0:
            yield Problem(f"{path}[{index}].condition.ttlSeconds", f"{delay} is negative")
        if rule.get("policy") in delays:
            yield Problem(f"{path}[{index}]", f"a second rule for {rule.get('policy')} on {given[0]}")
        delays[rule.get("policy", "")] = delay
    for status, delays in seen.items():
        ordered = [delays[policy] for policy in DELETION_ORDER if policy in delays]
        if ordered != sorted(ordered):
            yield Problem(path, f"on {status}: workers must go before the cluster, and the cluster before the RayJob")


def ttl_needs_shutdown(manifest: Manifest) -> Iterator[Problem]:
    """Rule 4: a time to live without anything to delete."""
    spec = job_spec(manifest)
    delay = spec.get("ttlSecondsAfterFinished") or 0
    if delay < 0:
        yield Problem("spec.ttlSecondsAfterFinished", f"{delay} is negative")
    if delay > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield Problem("spec.ttlSecondsAfterFinished", "needs spec.shutdownAfterJobFinishes: true")


def submission_mode_allows_it(manifest: Manifest) -> Iterator[Problem]:
    """Rule 5: what InteractiveMode, SidecarMode and clusterSelector exclude."""
    if manifest["kind"] != "RayJob":
        return
    spec = job_spec(manifest)
    mode, selected, backoff = spec.get("submissionMode"), spec.get("clusterSelector"), spec.get("backoffLimit") or 0
    if mode not in (None, "", "K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
        yield Problem("spec.submissionMode", f"{mode!r} is not K8sJobMode, HTTPMode, InteractiveMode or SidecarMode")
    if backoff < 0:
        yield Problem("spec.backoffLimit", f"{backoff} is negative")
    if backoff > 0 and selected:
        yield Problem("spec.backoffLimit", "cannot be combined with clusterSelector: a retry makes a new cluster")
    if backoff > 0 and mode == "InteractiveMode":
        yield Problem("spec.backoffLimit", "cannot be combined with InteractiveMode")
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(name) is not None and spec[name] <= 0:
            yield Problem(f"spec.{name}", f"{spec[name]} must be positive")
    if not selected and not spec.get("rayClusterSpec"):
        yield Problem("spec.rayClusterSpec", "required, but missing (or give clusterSelector)")
    if mode == "SidecarMode":
        for name in ("clusterSelector", "submitterPodTemplate", "submitterConfig"):
            if spec.get(name):
                yield Problem(f"spec.{name}", "cannot be combined with SidecarMode; remove it")
        for path, pod in pods(manifest):
            if "headGroupSpec" in path and pod.get("restartPolicy") not in (None, "", "Never"):
                yield Problem(f"{path}.restartPolicy", "must be Never or absent with SidecarMode")


def autoscaler_v2_owns_restarts(manifest: Manifest) -> Iterator[Problem]:
    """Rule 6: the autoscaler v2 replaces pods itself."""
    cluster, path = cluster_spec(manifest)
    options, enabled = cluster.get("autoscalerOptions") or {}, bool(cluster.get("enableInTreeAutoscaling"))
    env_path, variables = f"{path}.headGroupSpec.env", head_environment(cluster)
    by_variable = str(variables.get("RAY_enable_autoscaler_v2", "")).lower() in ("1", "true")
    if options.get("version") == "v2" and not enabled:
        yield Problem(f"{path}.autoscalerOptions.version", "v2 needs enableInTreeAutoscaling: true")
    if by_variable and not enabled:
        yield Problem(env_path, "RAY_enable_autoscaler_v2 needs enableInTreeAutoscaling: true")
    if options.get("version") and "RAY_enable_autoscaler_v2" in variables:
        yield Problem(env_path, "RAY_enable_autoscaler_v2 and autoscalerOptions.version are both set; keep the latter")
    if enabled and (options.get("version") == "v2" or by_variable):
        for pod_path, pod in pods(manifest):
            if pod.get("restartPolicy") not in (None, "", "Never"):
                yield Problem(f"{pod_path}.restartPolicy", "must be Never or absent with autoscaler v2")
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        if enabled and group.get("suspend"):
            yield Problem(f"{path}.workerGroupSpecs[{index}].suspend", "cannot be combined with autoscaling")


def resources_and_labels_stand_once(manifest: Manifest) -> Iterator[Problem]:
    """Rule 7: resources either in rayStartParams or at group level; labels only at group level."""
    for path, group in groups(manifest):
        params = group.get("rayStartParams") or {}
        doubled = [name for name in START_RESOURCES if params.get(name)]
        if doubled and group.get("resources"):
            yield Problem(f"{path}.resources", f"also set in rayStartParams ({', '.join(doubled)}); keep one")
        if "labels" in params:
            yield Problem(f"{path}.rayStartParams.labels", f"not supported; move it to {path}.labels")
        for key, value in (group.get("labels") or {}).items():
            name = str(key).rpartition("/")[2]
            if not LABEL_NAME.match(name) or (value and not LABEL_NAME.match(str(value))):
                yield Problem(f"{path}.labels", f"{key}: {value} is not a Kubernetes label")


def fault_tolerance_is_configured_once(manifest: Manifest) -> Iterator[Problem]:
    """Rule 8: gcsFaultToleranceOptions exclude the annotation, the variables and the start parameters before them."""
    cluster, path = cluster_spec(manifest)
    head = cluster.get("headGroupSpec") or {}
    params, variables = head.get("rayStartParams") or {}, head_environment(cluster)
    annotations = metadata_of(manifest).get("annotations") or {}
    if params.get("redis-username") or "REDIS_USERNAME" in variables:
        yield Problem(f"{path}.headGroupSpec", "set gcsFaultToleranceOptions.redisUsername instead of REDIS_USERNAME")
    if not cluster.get("gcsFaultToleranceOptions"):
        if "RAY_REDIS_ADDRESS" in variables and annotations.get("ray.io/ft-enabled") != "true":
            yield Problem(f"{path}.headGroupSpec", "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions")
        return
    clashes = [f"annotation {name}" for name in FT_ANNOTATIONS if annotations.get(name)]
    clashes += [f"variable {name}" for name in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS") if name in variables]
    clashes += ["rayStartParams.redis-password"] if params.get("redis-password") else []
    for clash in clashes:
        yield Problem(f"{path}.gcsFaultToleranceOptions", f"cannot be combined with {clash}; remove the latter")


def token_auth_is_possible(manifest: Manifest) -> Iterator[Problem]:
    """Rule 9: Kubernetes-delegated tokens only for RayCluster; plain tokens need a stated Ray of 2.52 or newer."""
    cluster, path = cluster_spec(manifest)
    auth = cluster.get("authOptions") or {}
    if manifest["kind"] == "RayJob" and auth.get("enableK8sTokenAuth"):
        yield Problem(f"{path}.authOptions.enableK8sTokenAuth", "refused for RayJob; use plain mode: token")
    if auth.get("mode") != "token":
        return
    version = re.match(r"^v?(\d+)\.(\d+)\.\d+", str(cluster.get("rayVersion") or ""))
    if not version:
        yield Problem(f"{path}.rayVersion", "required as x.y.z with authOptions.mode: token")
    elif (int(version[1]), int(version[2])) < OLDEST_RAY_WITH_TOKENS:
        yield Problem(f"{path}.rayVersion", f"{cluster['rayVersion']} has no token authentication; use 2.52 or newer")


def environment_is_yaml(manifest: Manifest) -> Iterator[Problem]:
    """The runtime environment travels as a string; a broken one fails only when the job is submitted."""
    try:
        variables = runtime_environment(manifest).get("env_vars") or {}
    except ValueError as error:
        yield Problem("spec.runtimeEnvYAML", str(error))
        return
    for name, value in variables.items():
        if not isinstance(value, str):
            yield Problem(f"spec.runtimeEnvYAML.env_vars.{name}", f"{value!r} must be a string; quote it")


def replicas_are_within_bounds(manifest: Manifest) -> Iterator[Problem]:
    """The operator starts minReplicas or maxReplicas pods instead of a number outside of them, and says nothing."""
    for path, group in worker_groups(manifest):
        least, most, wanted = group["minReplicas"], group["maxReplicas"], group.get("replicas")
        for name in ("minReplicas", "maxReplicas", "replicas"):
            if (group.get(name) or 0) < 0:
                yield Problem(f"{path}.{name}", f"{group[name]} is negative")
        if least > most:
            yield Problem(f"{path}.minReplicas", f"{least} is more than maxReplicas {most}")
        elif wanted is not None and not least <= wanted <= most:
            yield Problem(f"{path}.replicas", f"{wanted} is not from minReplicas {least} to maxReplicas {most}")


def every_group_has_a_container(manifest: Manifest) -> Iterator[Problem]:
    """The operator refuses a group without containers."""
    for path, pod in pods(manifest):
        if not pod.get("containers"):
            yield Problem(f"{path}.containers", "at least one container is needed")


OPERATOR_RULES: tuple[Rule, ...] = (
    name_is_short_dns_label,
    suspension_needs_shutdown,
    deletion_rules_stand_alone,
    ttl_needs_shutdown,
    submission_mode_allows_it,
    autoscaler_v2_owns_restarts,
    resources_and_labels_stand_once,
    fault_tolerance_is_configured_once,
    token_auth_is_possible,
    environment_is_yaml,
    replicas_are_within_bounds,
    every_group_has_a_container,
    claims_are_named,
)


def head_runs_no_work(manifest: Manifest) -> Iterator[Problem]:
    """Actors on the head share memory with the control plane: the usual cause of a lost cluster."""
    cluster, path = cluster_spec(manifest)
    head = cluster.get("headGroupSpec") or {}
    asked = (head.get("rayStartParams") or {}).get("num-cpus") or (head.get("resources") or {}).get("CPU")
    if cluster and asked != "0":
        yield Problem(f"{path}.headGroupSpec.rayStartParams", 'set num-cpus: "0" so that no actor lands on the head')


def image_fits_ray_version(manifest: Manifest) -> Iterator[Problem]:
    """Ray of the image, of the head and of the client must be one version."""
    cluster, path = cluster_spec(manifest)
    images = {c.get("image", "") for _, pod in pods(manifest) for c in (pod.get("containers") or [])[:1]}
    for image in sorted(filter(None, images)):
        tagged = re.search(r"(?:^|/)ray[a-z-]*:(\d+\.\d+\.\d+)", image)
        if tagged and tagged[1] != str(cluster.get("rayVersion")):
            yield Problem(f"{path}.rayVersion", f"{cluster.get('rayVersion')} differs from image {image}")


def kueue_counts_fixed_replicas(manifest: Manifest) -> Iterator[Problem]:
    """Kueue admits the declared size as a gang; in-tree autoscaling needs its newer elastic jobs."""
    cluster, path = cluster_spec(manifest)
    if KUEUE_LABEL in (metadata_of(manifest).get("labels") or {}) and cluster.get("enableInTreeAutoscaling"):
        yield Problem(f"{path}.enableInTreeAutoscaling", "Kueue refuses it unless its elastic jobs are enabled")


ADVICE: tuple[Rule, ...] = (
    head_runs_no_work,
    shutdown_deadlines_are_ordered,
    image_fits_ray_version,
    kueue_counts_fixed_replicas,
)
