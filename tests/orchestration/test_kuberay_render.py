"""Rendered manifests: golden files, pool sizes as pods, names, and what must never be missing."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration import kuberay, kuberay_overlay
from orchestration.config import Config, ConfigError, parse_config
from orchestration.kuberay import ClusterShape, kubernetes_name, pod_sizes, render, to_yaml
from orchestration.kuberay_command import main, validate_text
from orchestration.kuberay_overlay import OVERLAYS, apply_overlay
from orchestration.kuberay_schema import compact_nodes
from orchestration.kuberay_shutdown import job_stop_wait_s
from orchestration.train import DRAIN_SHARE
from tests.orchestration.kuberay_recipes import cpu_recipe, gpu_recipe

GOLDEN = Path(__file__).parent / "golden" / "kuberay"


def without_config(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Golden files must not change with every new key of the recipe or edit of the stop script."""
    for document in documents:
        if document["kind"] == "ConfigMap":
            document["data"] = dict.fromkeys(document["data"], "...")
        if document["kind"] == "RayJob":
            document["spec"]["metadata"]["softgrpo_config"] = "..."
    return documents


@pytest.mark.parametrize(
    ("name", "config", "shape"),
    [
        ("rayjob-cpu", cpu_recipe(), ClusterShape()),
        ("raycluster-cpu", cpu_recipe(), ClusterShape(kind="RayCluster", namespace="research")),
        ("rayjob-gpu", gpu_recipe(), ClusterShape(memory={"head": "32Gi"}, working_dir="s3://bucket/code.zip")),
    ],
)
def test_golden_files(name: str, config: Config, shape: ClusterShape) -> None:
    rendered = to_yaml(without_config(render(config, shape)))
    golden = GOLDEN / f"{name}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(rendered, encoding="utf-8")
    assert rendered == golden.read_text(encoding="utf-8"), f"{golden.name}: UPDATE_GOLDEN=1 rewrites it; read the diff"


def workload(config: Config, shape: ClusterShape | None = None) -> dict[str, Any]:
    return render(config, shape or ClusterShape())[-1]


def test_pool_sizes_become_pods() -> None:
    sizes = {size.pool: size for size in pod_sizes(gpu_recipe(), ClusterShape())}
    assert (sizes["learner"].replicas, sizes["learner"].gpus, sizes["learner"].cpus) == (2, 8, 32)
    assert (sizes["rollout"].replicas, sizes["rollout"].gpus) == (4, 2)
    assert (sizes["verifier"].replicas, sizes["verifier"].cpus) == (3, 4)


def test_fractional_engines_share_a_pod() -> None:
    config = gpu_recipe(rollout={"num_actors": 5, "num_gpus": 0.5})
    rollout = {size.pool: size for size in pod_sizes(config, ClusterShape())}["rollout"]
    assert (rollout.replicas, rollout.gpus) == (3, 1)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"learner": {"num_gpus": 0.5}}, r"learner.num_gpus=0.5: Kubernetes gives pods whole GPUs"),
        ({"learner": {"world_size": 12, "num_gpus": 1}}, r"world_size=12 does not fill pods of 8 ranks"),
        ({"rollout": {"num_gpus": 16, "tensor_parallel_size": 16}}, r"needs 16 GPUs in one pod"),
        ({"output_dir": "/home/me/run"}, r"not on the shared volume /mnt/softgrpo"),
        ({"output_dir": "../../etc"}, r"not on the shared volume /mnt/softgrpo"),
    ],
)
def test_pools_that_pods_cannot_express_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render(gpu_recipe(**sections), ClusterShape())


def pod_templates(spec: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = spec["rayClusterSpec"]
    return [group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def test_no_pod_runs_as_root() -> None:
    spec = workload(gpu_recipe())["spec"]
    for template in [*pod_templates(spec), spec["submitterPodTemplate"]]:
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("stop_grace_s", [10, 40, 600])
def test_the_last_checkpoint_has_its_time_before_every_deadline(stop_grace_s: int) -> None:
    config = gpu_recipe(checkpoint={"stop_grace_s": stop_grace_s})
    spec = workload(config)["spec"]
    head, *workers = (template["spec"] for template in pod_templates(spec))
    stop_wait = job_stop_wait_s(config)
    assert stop_wait > stop_grace_s
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == str(stop_wait)
    stop = int(head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert stop > stop_wait
    assert head["terminationGracePeriodSeconds"] > stop + drain_s(head)
    for pod in workers:
        assert pod["terminationGracePeriodSeconds"] > drain_s(pod) > stop_wait
        assert drain_s(pod) * DRAIN_SHARE > stop_grace_s, "a learner pod that goes alone"
    assert validate_text(to_yaml(render(config, ClusterShape())), compact_nodes(), "rendered")[:2] == ([], [])


def drain_s(pod: dict[str, Any]) -> int:
    variables = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    return int(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])


def test_head_runs_no_work_and_stop_has_time() -> None:
    spec = workload(cpu_recipe())["spec"]
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    assert environment["working_dir"] == "file:///mnt/softgrpo/code.zip"
    assert not set(spec["entrypoint"]) & set("$;&|<>'\"`\\"), "the submitter's shell would interpret it"


def test_run_directory_is_shared_and_config_loads() -> None:
    settings = render(cpu_recipe(), ClusterShape())[0]
    config = parse_config(yaml.safe_load(settings["data"]["config.yaml"]), "ConfigMap")
    assert config.output_dir == "/mnt/softgrpo/outputs/Demo_Run.1"
    compile(settings["data"]["stop_jobs.py"], "stop_jobs.py", "exec")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen-7b", "qwen-7b"),
        ("a" * 40, "a" * 40),
        ("Demo_Run.1", r"demo-run-1-[0-9a-f]{6}"),
        ("7b", r"run-7b-[0-9a-f]{6}"),
        ("a" * 41, r"a{33}-[0-9a-f]{6}"),
    ],
)
def test_kubernetes_names(name: str, expected: str) -> None:
    assert re.fullmatch(expected, kubernetes_name(name))


@pytest.mark.parametrize(
    "names",
    [
        ["run-a", "Run_A", "run.a", "run--a", "RUN-A"],
        ["7b", "run-7b", "7B"],
        ["experiment-" * 5 + suffix for suffix in ("one", "two")],
        ["_" * 3, "-" * 3],
    ],
)
def test_names_stay_distinct_and_legal(names: list[str]) -> None:
    labels = {kubernetes_name(name) for name in names}
    assert len(labels) == len(names)
    for label in labels:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label)
        assert len(label) <= kuberay.NAME_LIMIT


def test_ray_version_is_the_locked_one() -> None:
    lock = Path(__file__).parents[2] / "requirements" / "cpu.lock"
    assert f"ray=={kuberay.RAY_VERSION}" in lock.read_text(encoding="utf-8").replace("ray[default]", "ray").split()


def test_render_command_prints_what_validate_accepts(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["render", "--config", recipe, "rollout.num_actors=3"]) == 0
    manifest = tmp_path / "job.yaml"
    manifest.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["validate", str(manifest)]) == 0
    assert "valid for KubeRay 1.5 and newer" in capsys.readouterr().out
    groups = list(yaml.safe_load_all(manifest.read_text()))[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["replicas"] for group in groups] == [1, 3, 1]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(cpu_recipe().model_dump(mode="json")), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--memory", "rollouts=4Gi"], r"--memory rollouts=4Gi: write POOL=AMOUNT"),
        (["--memory", "head=lots"], r"'lots' is not a quantity"),
        (["--memory", "learner=-5Gi"], r"'-5Gi' is negative"),
        (["--mount", "shared"], r"--mount shared: give an absolute path"),
        (["--overlay", "no"], r"--overlay no: no such overlay"),
        (["--namespace", "Bad NS"], r"--namespace 'Bad NS': must be lower case"),
        (["--namespace", ""], r"--namespace '': must be lower case"),
        (["--claim", ""], r"--claim '': must be lower case"),
        (["--claim", "my_claim"], r"--claim 'my_claim': must be lower case"),
        (["--deadline-s", "0"], r"--deadline-s 0: must be positive"),
        (["sampling.temperature=0"], r"sampling.temperature=0 with thinking: soft: training needs noise"),
        (["--backoff-limit", "-1"], r"spec.backoffLimit: -1 is negative"),
    ],
)
def test_bad_option_values_are_configuration_errors(option: list[str], message: str, recipe: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["render", "--config", recipe, *option])


@pytest.mark.parametrize("route", ["printed", "written"])
def test_what_an_overlay_breaks_is_refused(
    route: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy with values of one's own may not fit the recipe."""
    shutil.copytree(OVERLAYS / "autoscaling", tmp_path / "overlays" / "autoscaling")
    copied = tmp_path / "overlays" / "autoscaling" / "kustomization.yaml"
    copied.write_text(re.sub("minReplicas, value: 1", "minReplicas, value: 99", copied.read_text()), encoding="utf-8")
    monkeypatch.setattr(kuberay_overlay, "OVERLAYS", tmp_path / "overlays")
    where = ["--output", str(tmp_path / "base")] if route == "written" else []
    with pytest.raises(ConfigError, match="minReplicas: 99 is more than maxReplicas 16"):
        main(["render", "--config", recipe, "--overlay", "autoscaling", *where])
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(("num_actors", "ceiling"), [(3, 16), (32, 32)])
def test_autoscaling_may_grow_the_pool_and_never_cuts_it(num_actors: int, ceiling: int) -> None:
    shape = ClusterShape()
    job = apply_overlay(render(cpu_recipe(rollout={"num_actors": num_actors}), shape), "autoscaling", shape)[-1]
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, num_actors, ceiling)
