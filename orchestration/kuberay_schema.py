"""Structure of the Kubernetes objects that we render, as the API server's strict mode sees it.

One small tree of `Node` describes what may stand where: unknown fields and wrong types are errors with a path and,
where there is one, the nearest known name. The tree is compiled either from the compact description in
`kuberay_fields` (every field that we render, with the KubeRay release that introduced it) or from a full custom
resource definition (`from_crd`, for `softgrpo kuberay validate --crd`). Tests compare the two.

    manifest -> check(node, value) -> [Problem(path, message)]
"""

from __future__ import annotations

import difflib
import functools
import gzip
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from orchestration.kuberay_fields import KINDS, METADATA

OLDEST_KUBERAY = "1.5"
QUANTITY = re.compile(r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+|[KMGTPE]i|[numkMGTPE])?$")
SCALARS = ("string", "integer", "number", "boolean", "quantity", "port", "any")


class SchemaError(ValueError):
    """A schema file that cannot be used; the message names the file and the fix."""


@dataclass(frozen=True)
class Problem:
    """One thing that the API server or the operator would refuse."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


@dataclass(frozen=True)
class Node:
    """What may stand at one place of a manifest.

    `kind` is one of `SCALARS`, `object` (named `fields`), `map` (any keys, `item` values) or `list` (`item` elements).
    `since` is the first KubeRay release that knows the field.
    """

    kind: str
    fields: Mapping[str, Node] = field(default_factory=dict)
    item: Node | None = None
    required: frozenset[str] = frozenset()
    choices: tuple[str, ...] = ()
    since: str = OLDEST_KUBERAY


def check(node: Node, value: Any, path: str) -> Iterator[Problem]:
    """Yield every place where `value` does not fit `node`; null of a field counts as absent, as in the API server."""
    if node.kind == "any" or value is None:
        return
    if node.kind == "object":
        yield from _check_object(node, value, path)
    elif node.kind == "map":
        if not isinstance(value, dict):
            yield Problem(path, f"expected a map, found {_describe(value)}")
            return
        for key, child in value.items():
            if not isinstance(key, str):
                yield Problem(path, f"key {key!r} must be a string; quote it")
            elif node.item:
                yield from check(node.item, child, f"{path}.{key}")
    elif node.kind == "list":
        if not isinstance(value, list):
            yield Problem(path, f"expected a list, found {_describe(value)}")
            return
        for index, child in enumerate(value):
            if child is None:
                yield Problem(f"{path}[{index}]", "is empty; remove it")
            elif node.item:
                yield from check(node.item, child, f"{path}[{index}]")
    else:
        yield from _check_scalar(node, value, path)


def _check_object(node: Node, value: Any, path: str) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield Problem(path, f"expected an object, found {_describe(value)}")
        return
    for name in sorted(node.required):
        if value.get(name) is None:
            yield Problem(f"{path}.{name}", "required, but missing")
    for name, child in value.items():
        if name in node.fields:
            yield from check(node.fields[name], child, f"{path}.{name}")
        else:
            close = difflib.get_close_matches(str(name), node.fields, n=1)
            hint = f"did you mean {close[0]}?" if close else "remove it, or give --crd FILE if your operator knows it"
            yield Problem(f"{path}.{name}", f"unknown field; {hint}")


def _check_scalar(node: Node, value: Any, path: str) -> Iterator[Problem]:
    fits = {
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "quantity": isinstance(value, int | str) and not isinstance(value, bool),
        "port": isinstance(value, int | str) and not isinstance(value, bool),
    }[node.kind]
    if not fits:
        quote = "; quote it" if node.kind == "string" and isinstance(value, bool | int | float) else ""
        yield Problem(path, f"expected {_article(node.kind)}, found {_describe(value)}{quote}")
    elif node.kind == "quantity" and not QUANTITY.match(str(value)):
        yield Problem(path, f"{value!r} is not a quantity such as 2, 500m or 16Gi")
    elif node.kind == "quantity" and str(value).startswith("-"):
        yield Problem(path, f"{value!r} is negative; every quantity here is an amount of a resource")
    elif node.choices and value not in node.choices:
        yield Problem(path, f"{value!r} is not one of {', '.join(node.choices)}")


def newest_release_needed(node: Node, value: Any) -> str:
    """The oldest KubeRay release that knows every field of a valid `value`, e.g. `1.5`."""
    newest = node.since
    if node.kind == "object" and isinstance(value, dict):
        children = [(node.fields[name], child) for name, child in value.items() if name in node.fields]
    elif node.kind == "list" and node.item and isinstance(value, list):
        children = [(node.item, child) for child in value]
    elif node.kind == "map" and node.item and isinstance(value, dict):
        children = [(node.item, child) for child in value.values()]
    else:
        children = []
    return max([newest, *(newest_release_needed(child, part) for child, part in children)], key=release_order)


def release_order(release: str) -> tuple[int, ...]:
    """Sort key of a release such as `1.5` or `v1.7.0`."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])


def _describe(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "boolean", int: "number", float: "number", str: "string"}
    kind = names.get(type(value), type(value).__name__)
    return kind if isinstance(value, dict | list) else f"{kind} {value!r}"


def _article(kind: str) -> str:
    return "an integer" if kind == "integer" else f"a {kind}"


def compile_node(description: Any, since: str = OLDEST_KUBERAY) -> Node:
    """Build a `Node` from the compact description.

    A word is a scalar type, `A|B|C` the allowed strings, `{word}` a map of them, `[x]` a list, a dictionary an object.
    A key may end in `!` (required) and `@1.7` (known since that release).
    """
    if isinstance(description, dict):
        fields: dict[str, Node] = {}
        required = set()
        for key, child in description.items():
            name, _, release = key.partition("@")
            if name.endswith("!"):
                name = name[:-1]
                required.add(name)
            fields[name] = compile_node(child, release or since)
        return Node("object", fields=fields, required=frozenset(required), since=since)
    if isinstance(description, list):
        return Node("list", item=compile_node(description[0], since), since=since)
    if description.startswith("{"):
        return Node("map", item=compile_node(description[1:-1], since), since=since)
    if description in SCALARS:
        return Node(description, since=since)
    return Node("string", choices=tuple(description.split("|")), since=since)


def from_crd(path: Path) -> dict[str, Node]:
    """Kind -> tree of version v1, from a file or a directory of custom resource definitions (YAML, optionally gzip)."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    nodes: dict[str, Node] = {}
    for file in files:
        if not file.name.endswith((".yaml", ".yml", ".yaml.gz", ".yml.gz")):
            continue
        for definition in _read_documents(file):
            if definition.get("kind") == "CustomResourceDefinition":
                nodes[definition["spec"]["names"]["kind"]] = _version_v1(definition, file)
    if not nodes:
        raise SchemaError(f"{path}: holds no CustomResourceDefinition; give a file of KubeRay's config/crd/bases")
    return nodes


def _read_documents(file: Path) -> list[dict[str, Any]]:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 1.4 MB of YAML: 1 s in C, 15 s in Python
        documents = list(yaml.load_all(raw, Loader=loader))
    except FileNotFoundError:
        raise SchemaError(f"{file}: no such file") from None
    except (OSError, yaml.YAMLError) as error:
        raise SchemaError(f"{file}: cannot be read as YAML: {error}") from None
    return [document for document in documents if isinstance(document, dict)]


def _version_v1(definition: dict[str, Any], file: Path) -> Node:
    for version in definition["spec"]["versions"]:
        if version["name"] == "v1":
            node = _from_openapi(version["schema"]["openAPIV3Schema"])
            metadata = compile_node(METADATA)
            return Node("object", fields={**node.fields, "metadata": metadata}, required=node.required)
    raise SchemaError(f"{file}: {definition['spec']['names']['kind']} has no version v1; use KubeRay 1.5 or newer")


def _from_openapi(schema: dict[str, Any]) -> Node:
    if schema.get("x-kubernetes-int-or-string"):
        return Node("quantity" if "pattern" in schema else "port")
    kind = schema.get("type", "any")
    if kind == "object":
        if schema.get("x-kubernetes-preserve-unknown-fields"):
            return Node("any")
        if "properties" in schema:
            fields = {name: _from_openapi(child) for name, child in schema["properties"].items()}
            return Node("object", fields=fields, required=frozenset(schema.get("required", ())))
        extra = schema.get("additionalProperties")
        return Node("map", item=_from_openapi(extra) if isinstance(extra, dict) else Node("any"))
    if kind == "array":
        return Node("list", item=_from_openapi(schema["items"]))
    return Node(kind, choices=tuple(schema.get("enum", ())))


@functools.cache
def compact_nodes() -> Mapping[str, Node]:
    """Kind -> tree, from the description in `kuberay_fields`."""
    shell = {"apiVersion!": "string", "kind!": "string", "metadata!": METADATA, "status": "any"}
    return MappingProxyType({kind: compile_node({**shell, **fields}) for kind, (_, fields) in KINDS.items()})
