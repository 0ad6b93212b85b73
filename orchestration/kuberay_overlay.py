"""Overlays of `configs/kuberay/`, applied here (plain YAML for those without kustomize) or copied beside a base.

An overlay is a kustomize Component: added resources (which get the namespace and the claim's name of `ClusterShape`,
so that nothing lands beside the run), and RFC 6902 patches chosen by kind. Patches of worker groups
begin with a `test` of the group's name, so an overlay on another layout fails instead of changing the wrong group.
Tests apply every overlay both here and with `kubectl kustomize` and compare.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import yaml

from orchestration import strict_yaml
from orchestration.config import ConfigError
from orchestration.kuberay import ClusterShape, to_yaml
from orchestration.kuberay_manifest import Manifest

OVERLAYS = Path(__file__).resolve().parent.parent / "configs" / "kuberay"


def overlay_names() -> list[str]:
    """Names of the shipped overlays."""
    return sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))


def apply_overlay(documents: list[Manifest], name: str, shape: ClusterShape) -> list[Manifest]:
    """The documents with one overlay applied; the input stays as it is. Raises `ConfigError` where it does not fit."""
    component = _component(name)
    documents = copy.deepcopy(documents)
    targets = {patch["target"]["kind"] for patch in component.get("patches", ())}
    if not component.get("resources") and not targets & {document["kind"] for document in documents}:
        raise ConfigError(f"--overlay {name}: changes {', '.join(sorted(targets))} only, and there is none")
    for patch in component.get("patches", ()):
        for document in documents:
            if document["kind"] == patch["target"]["kind"]:
                _patch(document, strict_yaml.load(patch["patch"]), name)
    for added in _added(name, shape).values():
        documents += added
    return documents


def write_base(documents: list[Manifest], directory: Path, overlays: list[str], shape: ClusterShape) -> None:
    """A directory for `kubectl apply -k`: one file per document, all overlays beside it, those chosen switched on."""
    chosen = [_directory(name).name for name in overlays]
    directory.mkdir(parents=True, exist_ok=True)
    files = {f"{document['kind'].lower()}.yaml": document for document in documents}
    for file, document in files.items():
        (directory / file).write_text(to_yaml([document]), encoding="utf-8")
    for name in overlay_names():
        shutil.copytree(OVERLAYS / name, directory / "overlays" / name, dirs_exist_ok=True)
        for file, added in _added(name, shape).items():
            (directory / "overlays" / name / file).write_text(to_yaml(added), encoding="utf-8")
    kustomization: Manifest = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        **({"namespace": shape.namespace} if shape.namespace else {}),
        "resources": sorted(files),
        "components": [f"overlays/{name}" for name in chosen],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization, sort_keys=False), encoding="utf-8")


def _directory(name: str) -> Path:
    if name not in overlay_names():
        raise ConfigError(f"--overlay {name}: no such overlay; choose from {', '.join(overlay_names())}")
    return OVERLAYS / name


def _component(name: str) -> Manifest:
    component: Manifest = strict_yaml.load((_directory(name) / "kustomization.yaml").read_text(encoding="utf-8"))
    return component


def _added(name: str, shape: ClusterShape) -> dict[str, list[Manifest]]:
    """File -> objects that an overlay adds, in the namespace of the others; a claim is the one that the pods mount."""
    files = {}
    for file in _component(name).get("resources", ()):
        files[file] = strict_yaml.load_all((_directory(name) / file).read_text(encoding="utf-8"))
        for document in files[file]:
            if document["kind"] == "PersistentVolumeClaim":
                document["metadata"]["name"] = shape.claim
            if shape.namespace:
                document["metadata"]["namespace"] = shape.namespace
    return files


def _patch(document: Manifest, operations: list[dict[str, Any]], name: str) -> None:
    for operation in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        where = f"overlay {name}: {document['kind']}{operation['path']}"
        try:
            container: Any = document
            for part in parents:
                container = container[int(part)] if isinstance(container, list) else container[part]
            _apply(container, last, operation)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"{where}: {error}; the manifest is not laid out as `kuberay render` does it") from None


def _apply(container: Any, last: str, operation: dict[str, Any]) -> None:
    key: Any = int(last) if isinstance(container, list) and last != "-" else last
    match operation["op"]:
        case "test":
            if container[key] != operation["value"]:
                raise ValueError(f"expected {operation['value']!r}, found {container[key]!r}")
        case "add" if key == "-":
            container.append(operation["value"])
        case "add":
            container[key] = operation["value"]
        case "replace":
            if not isinstance(container, list) and key not in container:
                raise KeyError(key)
            container[key] = operation["value"]
        case "remove":
            del container[key]
        case unknown:
            raise ValueError(f"operation {unknown} is not supported")
