"""Overlays: valid after application, the same by our applier and by kustomize, and failing where they do not fit."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.config import ConfigError
from orchestration.kuberay import ClusterShape, render, to_yaml
from orchestration.kuberay_command import validate_text
from orchestration.kuberay_overlay import OVERLAYS, apply_overlay, overlay_names, write_base
from orchestration.kuberay_schema import compact_nodes, release_order
from tests.orchestration.kuberay_recipes import full_definitions, gpu_recipe

NEWER = {"start-deadline": "1.6", "token-auth": "1.7"}
JOB_ONLY = {"sidecar", "start-deadline"}
SHAPE = ClusterShape()
ELSEWHERE = ClusterShape(namespace="research", claim="our-claim")


def base(kind: Any = "RayJob", shape: ClusterShape = SHAPE) -> list[dict[str, Any]]:
    return render(gpu_recipe(), replace(shape, kind=kind))


def cases() -> list[tuple[str, str]]:
    both = [(name, kind) for name in overlay_names() for kind in ("RayJob", "RayCluster")]
    return [(name, kind) for name, kind in both if kind == "RayJob" or name not in JOB_ONLY]


def test_the_promised_overlays_exist() -> None:
    promised = {"gpu", "autoscaling", "kueue", "token-auth", "mlflow", "spot", "shared-storage", "sidecar"}
    assert promised <= set(overlay_names())


@pytest.mark.parametrize(("name", "kind"), cases())
def test_overlays_change_something_and_stay_valid(name: str, kind: str) -> None:
    documents = base(kind)
    changed = apply_overlay(documents, name, SHAPE)
    assert changed != documents
    assert documents == base(kind), "the input must stay as it is"
    problems, advice, release = validate_text(to_yaml(changed), compact_nodes(), name)
    assert (problems, advice, release) == ([], [], NEWER.get(name, "1.5"))


def test_overlays_pass_the_full_definitions(shared_dir: Path) -> None:
    for release in ("v1.5.2", "v1.7.0"):
        nodes = compact_nodes() | full_definitions(shared_dir, release)
        for name, kind in cases():
            if release_order(release) >= release_order(NEWER.get(name, "1.5")):
                assert validate_text(to_yaml(apply_overlay(base(kind), name, SHAPE)), nodes, name)[0] == [], (
                    name,
                    release,
                )


def test_overlays_compose() -> None:
    documents = base()
    for name in ("gpu", "spot", "mlflow", "kueue", "sidecar", "metrics", "shared-storage"):
        documents = apply_overlay(documents, name, SHAPE)
    job = next(document for document in documents if document["kind"] == "RayJob")
    rollout = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]
    assert len(rollout["template"]["spec"]["tolerations"]) == 3
    assert rollout["labels"] == {"rl/pool": "rollout", "ray.io/market-type": "spot"}
    assert validate_text(to_yaml(documents), compact_nodes(), "all")[:2] == ([], [])


def test_kueue_with_autoscaling_is_advised_against() -> None:
    documents = apply_overlay(apply_overlay(base(), "kueue", SHAPE), "autoscaling", SHAPE)
    assert any(
        "Kueue refuses" in str(problem) for problem in validate_text(to_yaml(documents), compact_nodes(), "x")[1]
    )


def test_patches_for_both_kinds_are_the_same() -> None:
    for name in overlay_names():
        component = yaml.safe_load((OVERLAYS / name / "kustomization.yaml").read_text(encoding="utf-8"))
        patches = {patch["target"]["kind"]: patch["patch"] for patch in component.get("patches", ())}
        if name not in JOB_ONLY and "RayJob" in patches:
            assert patches["RayJob"].replace("/spec/rayClusterSpec/", "/spec/") == patches["RayCluster"], name


def test_an_overlay_on_another_layout_fails() -> None:
    documents = base()
    groups = documents[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    groups[0], groups[1] = groups[1], groups[0]
    with pytest.raises(ConfigError, match=r"overlay spot: .*expected 'rollout', found 'learner'"):
        apply_overlay(documents, "spot", SHAPE)


def test_an_overlay_for_another_kind_fails() -> None:
    with pytest.raises(ConfigError, match="changes RayJob only"):
        apply_overlay(base("RayCluster"), "sidecar", SHAPE)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed; its kustomize is the judge")
@pytest.mark.parametrize("shape", [SHAPE, ELSEWHERE], ids=["default", "elsewhere"])
@pytest.mark.parametrize("kind", ["RayJob", "RayCluster"])
def test_kustomize_agrees(kind: str, shape: ClusterShape, tmp_path: Path) -> None:
    chosen = [name for name, of in cases() if of == kind]
    expected = base(kind, shape)
    for name in chosen:
        expected = apply_overlay(expected, name, shape)
    write_base(base(kind, shape), tmp_path, chosen, shape)
    built = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    documents = list(yaml.safe_load_all(built.stdout))
    assert {d["kind"]: d for d in documents} == {d["kind"]: d for d in expected}


def test_added_objects_join_the_run() -> None:
    """In its namespace, and with the claim that its pods mount."""
    documents = base(shape=ELSEWHERE)
    for name in overlay_names():
        documents = apply_overlay(documents, name, ELSEWHERE)
    by_kind = {document["kind"]: document for document in documents}
    assert {document["metadata"].get("namespace") for document in documents} == {"research"}
    assert {"PodMonitor", "PersistentVolumeClaim"} <= set(by_kind)
    assert by_kind["PersistentVolumeClaim"]["metadata"]["name"] == "our-claim"


def test_a_base_is_for_its_namespace_and_claim(tmp_path: Path) -> None:
    """Also for objects that users add to it, and overlays that they switch on later."""
    write_base(base(shape=ELSEWHERE), tmp_path, [], ELSEWHERE)
    assert yaml.safe_load((tmp_path / "kustomization.yaml").read_text(encoding="utf-8"))["namespace"] == "research"
    claim = yaml.safe_load((tmp_path / "overlays" / "shared-storage" / "claim.yaml").read_text(encoding="utf-8"))
    assert claim["metadata"] == {"name": "our-claim", "namespace": "research"}


def test_a_base_holds_every_overlay_and_switches_on_those_chosen(tmp_path: Path) -> None:
    write_base(base(), tmp_path, ["gpu"], SHAPE)
    kustomization = yaml.safe_load((tmp_path / "kustomization.yaml").read_text(encoding="utf-8"))
    assert kustomization["components"] == ["overlays/gpu"]
    assert {path.name for path in (tmp_path / "overlays").iterdir()} == set(overlay_names())
    for file in kustomization["resources"]:
        assert validate_text((tmp_path / file).read_text(encoding="utf-8"), compact_nodes(), file)[0] == []
