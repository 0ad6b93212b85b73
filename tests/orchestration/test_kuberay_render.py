"""Rendered manifests: golden files, pool sizes as pods, names, and what must never be missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration import kuberay
from orchestration.config import Config, ConfigError, parse_config
from orchestration.kuberay import ClusterShape, kubernetes_name, pod_sizes, render, to_yaml
from orchestration.kuberay_command import main
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


def test_no_pod_runs_as_root_and_all_end_in_order() -> None:
    spec = workload(gpu_recipe())["spec"]
    cluster = spec["rayClusterSpec"]
    templates = [group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]
    for template in [*templates, spec["submitterPodTemplate"]]:
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    assert kuberay.GRACE_S > kuberay.WORKER_DRAIN_S > kuberay.JOB_STOP_WAIT_S
    assert kuberay.GRACE_S > kuberay.HEAD_STOP_S + kuberay.HEAD_DRAIN_S
    assert kuberay.HEAD_STOP_S > kuberay.JOB_STOP_WAIT_S


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
    [("qwen-7b", "qwen-7b"), ("Demo_Run.1", "demo-run-1"), ("7b", "run-7b"), ("a" * 40, "a" * 40)],
)
def test_kubernetes_names(name: str, expected: str) -> None:
    assert kubernetes_name(name) == expected


def test_long_names_stay_distinct_and_legal() -> None:
    names = {kubernetes_name("experiment-" * 5 + suffix) for suffix in ("one", "two")}
    assert len(names) == 2
    assert all(len(name) <= kuberay.NAME_LIMIT for name in names)


def test_ray_version_is_the_locked_one() -> None:
    lock = Path(__file__).parents[2] / "requirements" / "cpu.lock"
    assert f"ray=={kuberay.RAY_VERSION}" in lock.read_text(encoding="utf-8").replace("ray[default]", "ray").split()


def test_render_command_prints_what_validate_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(cpu_recipe().model_dump(mode="json")), encoding="utf-8")
    assert main(["render", "--config", str(recipe), "rollout.num_actors=3"]) == 0
    manifest = tmp_path / "job.yaml"
    manifest.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["validate", str(manifest)]) == 0
    assert "valid for KubeRay 1.5 and newer" in capsys.readouterr().out
    groups = list(yaml.safe_load_all(manifest.read_text()))[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["replicas"] for group in groups] == [1, 3, 1]


def test_bad_option_values_are_configuration_errors(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(cpu_recipe().model_dump(mode="json")), encoding="utf-8")
    for option in (["--memory", "rollouts=4Gi"], ["--memory", "head=lots"], ["--mount", "shared"], ["--overlay", "no"]):
        with pytest.raises(ConfigError, match=option[0].strip("-") if option[1] != "head=lots" else "quantity"):
            main(["render", "--config", str(recipe), *option])
