"""Names as the API server takes them; the operator's own, narrower ones stand in `kuberay_rules`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestration.kuberay_manifest import Manifest, metadata_of, pods
from orchestration.kuberay_schema import Problem

_WORD = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SHORT_NAME = "lower case letters, digits and dashes, a letter or digit at both ends, at most 63 characters"
OBJECT_NAME = "lower case letters, digits, dashes and dots, a letter or digit at both ends, at most 253 characters"


def is_short_name(name: str) -> bool:
    """A DNS-1123 label, as names of namespaces are."""
    return len(name) <= 63 and re.fullmatch(_WORD, name) is not None


def is_object_name(name: str) -> bool:
    """A DNS-1123 subdomain, as names of most objects are."""
    return len(name) <= 253 and re.fullmatch(rf"{_WORD}(\.{_WORD})*", name) is not None


def object_is_named(manifest: Manifest) -> Iterator[Problem]:
    """Of any kind: its name and its namespace."""
    metadata = metadata_of(manifest)
    name, namespace = metadata.get("name") or "", metadata.get("namespace")
    if not is_object_name(name):
        yield Problem("metadata.name", f"{name!r} must be {OBJECT_NAME}")
    if namespace is not None and not is_short_name(namespace):
        yield Problem("metadata.namespace", f"{namespace!r} must be {SHORT_NAME}")


def claims_are_named(manifest: Manifest) -> Iterator[Problem]:
    """Of a RayJob or RayCluster: no claim of another name can exist, so its pods would wait for ever."""
    for path, pod in pods(manifest):
        for index, volume in enumerate(pod.get("volumes") or []):
            claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
            if claim is not None and not is_object_name(claim):
                yield Problem(
                    f"{path}.volumes[{index}].persistentVolumeClaim.claimName", f"{claim!r} must be {OBJECT_NAME}"
                )
