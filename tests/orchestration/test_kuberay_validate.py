"""`softgrpo kuberay validate`: each rule of the operator and each kind of structural mistake is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.config import ConfigError
from orchestration.kuberay import ClusterShape, render, to_yaml
from orchestration.kuberay_command import main, validate_text
from orchestration.kuberay_schema import Node, SchemaError, compact_nodes, from_crd, release_order
from tests.orchestration.kuberay_recipes import cpu_recipe, full_definitions

Edit = Callable[[dict[str, Any]], None]


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def head_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return cluster_of(manifest)["headGroupSpec"]


def update(path: str, value: Any) -> Edit:
    """Set (or with None remove) the field at a dotted path; numbers index lists."""

    def edit(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        node: Any = manifest
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value

    return edit


def edits(*steps: Edit) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        for step in steps:
            step(manifest)

    return edit


def add_env(name: str, value: str = "x") -> Edit:
    return lambda manifest: head_of(manifest)["template"]["spec"]["containers"][0]["env"].append(
        {"name": name, "value": value}
    )


SELECT = edits(update("spec.clusterSelector", {"ray.io/cluster": "one"}), update("spec.rayClusterSpec", None))
NO_RETRY = update("spec.backoffLimit", 0)
V2 = edits(
    update("spec.rayClusterSpec.enableInTreeAutoscaling", True),
    update("spec.rayClusterSpec.autoscalerOptions", {"version": "v2"}),
)
RULES = "spec.deletionStrategy.deletionRules"
FT = update("spec.rayClusterSpec.gcsFaultToleranceOptions", {"redisAddress": "redis:6379"})
NO_SHUTDOWN = edits(update("spec.shutdownAfterJobFinishes", None), update("spec.ttlSecondsAfterFinished", None))


def rule(policy: str, ttl: int = 0, **condition: str) -> dict[str, Any]:
    return {"policy": policy, "condition": {**(condition or {"jobStatus": "FAILED"}), "ttlSeconds": ttl}}


def replicas(wanted: int, *, least: int, most: int) -> Edit:
    group = "spec.rayClusterSpec.workerGroupSpecs.1."
    return edits(
        update(group + "replicas", wanted), update(group + "minReplicas", least), update(group + "maxReplicas", most)
    )


BAD_JOBS: dict[str, tuple[Edit, str]] = {
    "1 name too long": (update("metadata.name", "a" * 48), r"has 48 characters; at most 47"),
    "1 name starts with a digit": (update("metadata.name", "7b"), r"must be lower case .* start with a letter"),
    "1 name with a dot": (update("metadata.name", "qwen.7b"), r"must be lower case"),
    "2 suspend without shutdown": (edits(update("spec.suspend", True), NO_SHUTDOWN), r"must be true with spec.suspend"),
    "2 kueue without shutdown": (
        edits(update("metadata.labels", {"kueue.x-k8s.io/queue-name": "q"}), NO_SHUTDOWN),
        r"must be true with label kueue",
    ),
    "2 suspend with selector": (
        edits(update("spec.suspend", True), SELECT, NO_RETRY),
        r"clusterSelector.*spec.suspend",
    ),
    "3 rules and shutdown": (update(RULES, [rule("DeleteSelf")]), r"spec.shutdownAfterJobFinishes: true"),
    "3 rules and ttl": (update(RULES, [rule("DeleteSelf")]), r"cannot be combined with spec.ttlSecondsAfterFinished"),
    "3 rules and onSuccess": (
        edits(update("spec.deletionStrategy.onSuccess.policy", "DeleteSelf"), update(RULES, [rule("DeleteSelf")])),
        r"cannot be combined with onSuccess",
    ),
    "3 only onSuccess": (
        update("spec.deletionStrategy.onSuccess.policy", "DeleteSelf"),
        r"both onSuccess and onFailure",
    ),
    "3 two conditions": (
        edits(NO_SHUTDOWN, update(RULES, [rule("DeleteSelf", jobStatus="FAILED", jobDeploymentStatus="Failed")])),
        r"exactly one of jobStatus and jobDeploymentStatus",
    ),
    "3 unknown policy": (edits(NO_SHUTDOWN, update(RULES, [rule("DeleteAll")])), r"'DeleteAll' is not one of"),
    "3 twice the same": (edits(NO_SHUTDOWN, update(RULES, [rule("DeleteSelf")] * 2)), r"a second rule for DeleteSelf"),
    "3 wrong order": (
        edits(NO_SHUTDOWN, update(RULES, [rule("DeleteCluster", 60), rule("DeleteSelf", 30)])),
        r"workers must go before the cluster",
    ),
    "3 workers under autoscaling": (
        edits(NO_SHUTDOWN, V2, update(RULES, [rule("DeleteWorkers")])),
        r"DeleteWorkers is not supported with autoscaling",
    ),
    "4 ttl without shutdown": (update("spec.shutdownAfterJobFinishes", False), r"needs spec.shutdownAfterJobFinishes"),
    "4 negative ttl": (update("spec.ttlSecondsAfterFinished", -1), r"-1 is negative"),
    "5 backoff with selector": (SELECT, r"backoffLimit: cannot be combined with clusterSelector"),
    "5 backoff in interactive mode": (update("spec.submissionMode", "InteractiveMode"), r"InteractiveMode"),
    "5 sidecar with submitter": (update("spec.submissionMode", "SidecarMode"), r"submitterPodTemplate: cannot be"),
    "5 sidecar with submitter config": (update("spec.submissionMode", "SidecarMode"), r"submitterConfig: cannot be"),
    "5 sidecar with selector": (
        edits(SELECT, NO_RETRY, update("spec.submissionMode", "SidecarMode")),
        r"clusterSelector: cannot be combined with SidecarMode",
    ),
    "5 sidecar with restarts": (
        edits(
            update("spec.submissionMode", "SidecarMode"),
            update("spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "Always"),
        ),
        r"must be Never or absent with SidecarMode",
    ),
    "5 unknown mode": (update("spec.submissionMode", "Sidecar"), r"'Sidecar' is not K8sJobMode"),
    "5 no cluster": (update("spec.rayClusterSpec", None), r"spec.rayClusterSpec: required"),
    "6 worker restarts under v2": (
        edits(V2, update("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.restartPolicy", "OnFailure")),
        r"workerGroupSpecs\[0\].template.spec.restartPolicy: must be Never or absent with autoscaler v2",
    ),
    "6 head restarts under v2": (
        edits(V2, update("spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "Always")),
        r"headGroupSpec.template.spec.restartPolicy: must be Never",
    ),
    "6 v2 given twice": (edits(V2, add_env("RAY_enable_autoscaler_v2", "1")), r"are both set"),
    "6 v2 without autoscaling": (
        update("spec.rayClusterSpec.autoscalerOptions", {"version": "v2"}),
        r"v2 needs enableInTreeAutoscaling",
    ),
    "6 variable without autoscaling": (add_env("RAY_enable_autoscaler_v2", "true"), r"needs enableInTreeAutoscaling"),
    "7 resources twice": (
        update("spec.rayClusterSpec.headGroupSpec.resources", {"CPU": "0"}),
        r"also set in rayStartParams \(num-cpus\)",
    ),
    "7 labels as start parameter": (
        update("spec.rayClusterSpec.workerGroupSpecs.1.rayStartParams", {"labels": "rl/pool=rollout"}),
        r"rayStartParams.labels: not supported; move it",
    ),
    "7 label that is none": (
        update("spec.rayClusterSpec.workerGroupSpecs.1.labels", {"rl/pool": "roll out"}),
        r"rl/pool: roll out is not a Kubernetes label",
    ),
    "8 annotation": (
        edits(FT, update("metadata.annotations", {"ray.io/ft-enabled": "true"})),
        r"cannot be combined with annotation ray.io/ft-enabled",
    ),
    "8 password variable": (edits(FT, add_env("REDIS_PASSWORD")), r"variable REDIS_PASSWORD"),
    "8 address variable": (edits(FT, add_env("RAY_REDIS_ADDRESS")), r"variable RAY_REDIS_ADDRESS"),
    "8 password parameter": (
        edits(FT, update("spec.rayClusterSpec.headGroupSpec.rayStartParams.redis-password", "x")),
        r"rayStartParams.redis-password",
    ),
    "8 address without options": (add_env("RAY_REDIS_ADDRESS"), r"RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions"),
    "9 delegated tokens": (
        update("spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True),
        r"enableK8sTokenAuth: refused for RayJob",
    ),
    "9 tokens without version": (update("spec.rayClusterSpec.rayVersion", None), r"rayVersion: required as x.y.z"),
    "9 tokens before 2.52": (update("spec.rayClusterSpec.rayVersion", "2.51.1"), r"2.51.1 has no token"),
    "5 no deadline at all": (update("spec.activeDeadlineSeconds", 0), r"activeDeadlineSeconds: 0 must be positive"),
    "5 no time to start": (update("spec.preRunningDeadlineSeconds", 0), r"preRunningDeadlineSeconds: 0 must be"),
    "bounds crossed": (replicas(2, least=9, most=4), r"\[1\].minReplicas: 9 is more than maxReplicas 4"),
    "negative bounds": (replicas(2, least=-1, most=4), r"\[1\].minReplicas: -1 is negative"),
    "negative replicas": (replicas(-2, least=0, most=4), r"\[1\].replicas: -2 is negative"),
    "replicas above": (replicas(32, least=1, most=16), r"replicas: 32 is not from minReplicas 1 to maxReplicas 16"),
    "replicas below": (replicas(0, least=1, most=16), r"replicas: 0 is not from minReplicas 1"),
    "environment not YAML": (update("spec.runtimeEnvYAML", "a: [1"), r"runtimeEnvYAML: not YAML"),
    "environment with a key twice": (
        update("spec.runtimeEnvYAML", "working_dir: a\nworking_dir: b"),
        r"runtimeEnvYAML: not YAML: (.*\n)*.*'working_dir' a second time",
    ),
    "environment is a list": (update("spec.runtimeEnvYAML", "[a]"), r"runtimeEnvYAML: expected keys and values"),
    "variables as a list": (update("spec.runtimeEnvYAML", "env_vars: [a]"), r"env_vars: expected names and values"),
    "environment with a number": (update("spec.runtimeEnvYAML", "env_vars: {A: 1}"), r"env_vars.A: 1 must be a string"),
    "no container": (
        update("spec.rayClusterSpec.headGroupSpec.template.spec.containers", []),
        r"at least one container",
    ),
    "misspelt field": (update("spec.backofLimit", 3), r"spec.backofLimit: unknown field; did you mean backoffLimit"),
    "misspelt group field": (
        update("spec.rayClusterSpec.workerGroupSpecs.0.minReplica", 1),
        r"minReplica: unknown field; did you mean minReplicas",
    ),
    "ttl as text": (update("spec.ttlSecondsAfterFinished", "600"), r"expected an integer, found string '600'"),
    "start parameter as number": (
        update("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        r"num-cpus: expected a string, found number 0; quote it",
    ),
    "numeric variable": (
        lambda manifest: head_of(manifest)["template"]["spec"]["containers"][0]["env"].append(
            {"name": "A", "value": 1}
        ),
        r"value: expected a string, found number 1; quote it",
    ),
    "missing group name": (
        update("spec.rayClusterSpec.workerGroupSpecs.0.groupName", None),
        r"groupName: required, but missing",
    ),
    "memory that is none": (
        update("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.resources.limits.memory", "lots"),
        r"'lots' is not a quantity",
    ),
    "negative memory": (
        update("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.resources.limits.memory", "-5Gi"),
        r"limits.memory: '-5Gi' is negative",
    ),
    "namespace that is none": (update("metadata.namespace", "Bad NS"), r"metadata.namespace: 'Bad NS' must be lower"),
    "claim without a name": (
        update("spec.rayClusterSpec.headGroupSpec.template.spec.volumes.0.persistentVolumeClaim.claimName", ""),
        r"volumes\[0\].persistentVolumeClaim.claimName: '' must be lower case",
    ),
    "empty list item": (
        update("spec.rayClusterSpec.headGroupSpec.template.spec.containers", [None]),
        r"containers\[0\]: is empty; remove it",
    ),
    "replicas as boolean": (
        update("spec.rayClusterSpec.workerGroupSpecs.0.replicas", True),
        r"expected an integer, found boolean True",
    ),
    "old API": (update("apiVersion", "ray.io/v1alpha1"), r"'ray.io/v1alpha1' is not ray.io/v1"),
    "unknown kind": (update("kind", "RayJobs"), r"'RayJobs' is not one of"),
    "kind as a list": (update("kind", ["RayJob"]), r"kind: \['RayJob'\] is not one of"),
}


def good_job() -> dict[str, Any]:
    return copy.deepcopy(render(cpu_recipe(), ClusterShape())[-1])


@pytest.mark.parametrize("case", BAD_JOBS)
def test_bad_manifests_are_refused(
    case: str, nodes: Mapping[str, Node], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, message = BAD_JOBS[case]
    manifest = good_job()
    edit(manifest)
    file = tmp_path / "bad.yaml"
    file.write_text(to_yaml([manifest]), encoding="utf-8")
    assert main(["validate", str(file)]) == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors), errors


@pytest.fixture(scope="module")
def nodes() -> Mapping[str, Node]:
    return compact_nodes()


def test_delegated_tokens_are_fine_for_a_raycluster(nodes: Mapping[str, Node]) -> None:
    cluster = render(cpu_recipe(), ClusterShape(kind="RayCluster"))[-1]
    cluster["spec"]["authOptions"]["enableK8sTokenAuth"] = True
    problems, _, release = validate_text(to_yaml([cluster]), nodes, "x")
    assert (problems, release) == ([], "1.7")


def test_raycluster_names_may_be_longer(nodes: Mapping[str, Node]) -> None:
    cluster = render(cpu_recipe(), ClusterShape(kind="RayCluster"))[-1]
    cluster["metadata"]["name"] = "a" * 53
    assert not validate_text(to_yaml([cluster]), nodes, "x")[0]
    cluster["metadata"]["name"] = "a" * 54
    assert validate_text(to_yaml([cluster]), nodes, "x")[0]


def test_advice_does_not_refuse(nodes: Mapping[str, Node]) -> None:
    manifest = good_job()
    del head_of(manifest)["rayStartParams"]["num-cpus"]
    head_of(manifest)["template"]["spec"]["terminationGracePeriodSeconds"] = 20
    head_of(manifest)["template"]["spec"]["containers"][0]["image"] = "rayproject/ray:2.59.0-py311"
    problems, advice, _ = validate_text(to_yaml([manifest]), nodes, "x")
    assert not problems
    texts = "\n".join(map(str, advice))
    for expected in ("no actor lands on the head", "20 s end before the preStop of 75 s", "2.60.0 differs from image"):
        assert expected in texts


WORKER = "spec.rayClusterSpec.workerGroupSpecs.0.template.spec."
HEAD = "spec.rayClusterSpec.headGroupSpec.template.spec."
DISORDER: dict[str, tuple[Edit, str]] = {
    "worker's drain before the stop wait": (
        update(WORKER + "containers.0.env.0.value", "20"),
        r"workerGroupSpecs\[0\].*: the drain of 20 s ends before the stop wait of 60 s",
    ),
    "Ray's own drain before the stop wait": (
        update(WORKER + "containers.0.env", []),
        r"workerGroupSpecs\[0\].*: the drain of 30 s ends before the stop wait of 60 s",
    ),
    "worker's grace before its drain": (
        update(WORKER + "terminationGracePeriodSeconds", 90),
        r"workerGroupSpecs\[0\].*: 90 s end before the drain of 90 s",
    ),
    "drains before a long stop wait": (
        update("spec.runtimeEnvYAML", "env_vars: {RAY_JOB_STOP_WAIT_TIME_S: '110'}"),
        r"workerGroupSpecs\[1\].*: the drain of 90 s ends before the stop wait of 110 s",
    ),
    "preStop before a long stop wait": (
        update("spec.runtimeEnvYAML", "env_vars: {RAY_JOB_STOP_WAIT_TIME_S: '75'}"),
        r"headGroupSpec.*lifecycle.preStop: its 75 s end before the stop wait of 75 s",
    ),
    "head's grace before preStop and drain": (
        update(HEAD + "terminationGracePeriodSeconds", 100),
        r"headGroupSpec.*: 100 s end before the preStop of 75 s and the drain of 30 s",
    ),
    "head that stops no job": (
        update(HEAD + "containers.0.lifecycle", None),
        r"headGroupSpec.*: the drain of 30 s ends before the stop wait of 60 s",
    ),
}


@pytest.mark.parametrize("case", DISORDER)
def test_disordered_shutdown_deadlines_are_advised_against(case: str, nodes: Mapping[str, Node]) -> None:
    edit, message = DISORDER[case]
    manifest = good_job()
    edit(manifest)
    problems, advice, _ = validate_text(to_yaml([manifest]), nodes, "x")
    assert not problems
    assert re.search(message, "\n".join(map(str, advice))), advice


def test_rendered_manifests_need_no_advice(nodes: Mapping[str, Node]) -> None:
    for kind in ("RayJob", "RayCluster"):
        assert validate_text(to_yaml(render(cpu_recipe(), ClusterShape(kind=kind))), nodes, "x")[:2] == ([], [])


def test_newer_fields_are_refused_for_an_older_operator(tmp_path: Path) -> None:
    manifest = good_job()
    manifest["spec"]["preRunningDeadlineSeconds"] = 600
    file = tmp_path / "job.yaml"
    file.write_text(to_yaml([manifest]), encoding="utf-8")
    assert main(["validate", str(file), "--kuberay", "v1.6.2"]) == 0
    assert main(["validate", str(file), "--kuberay", "1.5.2"]) == 2


@pytest.mark.parametrize(
    "text",
    ["", "a: [", "- 1", "kind: RayJob", "[]", "just words", "kind: RayJob\nspec: [1]", "[" * 5000, "kind: {a: b}"],
)
def test_files_that_are_no_manifest(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text, encoding="utf-8")
    assert main(["validate", str(file)]) == 2


def test_keys_given_twice_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the API server's strict mode; the last of them would win in silence."""
    file = tmp_path / "job.yaml"
    text = to_yaml([good_job()])
    assert text.count("  backoffLimit: 3\n") == 1
    file.write_text(text.replace("  backoffLimit: 3\n", "  backoffLimit: 3\n  backoffLimit: 0\n"), encoding="utf-8")
    assert main(["validate", str(file)]) == 2
    assert "'backoffLimit' a second time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("ConfigMap", update("metadata.name", "Bad_Name"), r"metadata.name: 'Bad_Name' must be lower case"),
        ("ConfigMap", update("metadata.name", None), r"metadata.name: '' must be lower case"),
        ("ConfigMap", update("metadata.name", "a..b"), r"metadata.name: 'a..b' must be"),
        ("ConfigMap", update("metadata.name", "a" * 254), r"at most 253 characters"),
        ("NetworkPolicy", update("metadata.namespace", "a.b"), r"metadata.namespace: 'a.b' must be"),
        ("NetworkPolicy", update("metadata.namespace", "a" * 64), r"at most 63 characters"),
    ],
)
def test_objects_have_names_that_the_api_server_takes(
    kind: str, edit: Edit, message: str, nodes: Mapping[str, Node]
) -> None:
    document = next(one for one in render(cpu_recipe(), ClusterShape()) if one["kind"] == kind)
    edit(document)
    assert re.search(message, "\n".join(map(str, validate_text(to_yaml([document]), nodes, "x")[0])))


def test_missing_files_are_configuration_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        main(["validate", str(tmp_path / "nothing.yaml")])
    manifest = tmp_path / "job.yaml"
    manifest.write_text(to_yaml([good_job()]), encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no CustomResourceDefinition"):
        main(["validate", str(manifest), "--crd", str(manifest)])
    with pytest.raises(SchemaError, match="no such file"):
        from_crd(tmp_path / "crd.yaml")


@pytest.fixture(scope="module", params=["v1.5.2", "v1.7.0"])
def definitions(request: pytest.FixtureRequest, shared_dir: Path) -> tuple[str, dict[str, Node]]:
    return request.param, full_definitions(shared_dir, request.param)


def differences(ours: Node, theirs: Node, path: str, release: str) -> list[str]:
    if "any" in (ours.kind, theirs.kind):
        return []
    found = [f"{path}: {ours.kind}, but {theirs.kind} in the definition"] if ours.kind != theirs.kind else []
    if theirs.choices and set(ours.choices) != set(theirs.choices):
        found.append(f"{path}: {ours.choices} against {theirs.choices}")
    for name, child in ours.fields.items():
        known, expected = name in theirs.fields, release_order(release) >= release_order(child.since)
        if known != expected:
            found.append(f"{path}.{name}: since {child.since}, but {'known' if known else 'unknown'} in {release}")
        elif known:
            found += differences(child, theirs.fields[name], f"{path}.{name}", release)
    if ours.item and theirs.item:
        found += differences(ours.item, theirs.item, f"{path}[]", release)
    return found


def test_compact_schema_agrees_with_the_definitions(definitions: tuple[str, dict[str, Node]]) -> None:
    release, theirs = definitions
    ours = compact_nodes()
    found = [text for kind in theirs for text in differences(ours[kind], theirs[kind], kind, release)]
    assert found == []


@pytest.mark.parametrize("kind", ["RayJob", "RayCluster"])
def test_rendered_manifests_pass_the_full_definitions(kind: Any, definitions: tuple[str, dict[str, Node]]) -> None:
    text = to_yaml(render(cpu_recipe(), ClusterShape(kind=kind)))
    assert validate_text(text, compact_nodes() | definitions[1], kind)[0] == []


def test_definition_files_are_read_by_the_command(shared_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    manifest = good_job()
    file.write_text(to_yaml([manifest]), encoding="utf-8")
    crd = str(shared_dir / "crd" / "ray.io_rayjobs.v1.5.2.yaml.gz")
    assert main(["validate", str(file), "--crd", crd]) == 0
    manifest["spec"]["preRunningDeadlineSeconds"] = 600
    file.write_text(yaml.safe_dump(manifest), encoding="utf-8")
    assert main(["validate", str(file), "--crd", crd]) == 2
