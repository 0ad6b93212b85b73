"""`softgrpo kuberay render` and `softgrpo kuberay validate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestration import strict_yaml
from orchestration.config import ConfigError, load_config
from orchestration.kuberay import POOLS, ClusterShape, render, to_yaml
from orchestration.kuberay_fields import KINDS
from orchestration.kuberay_names import object_is_named
from orchestration.kuberay_overlay import apply_overlay, overlay_names, write_base
from orchestration.kuberay_rules import ADVICE, OPERATOR_RULES
from orchestration.kuberay_schema import (
    Node,
    Problem,
    SchemaError,
    check,
    compact_nodes,
    from_crd,
    newest_release_needed,
    release_order,
)
from orchestration.validate import require_trainable

RAY_KINDS = ("RayJob", "RayCluster")
EXIT_DONE, EXIT_CONFIG = 0, 2


def main(arguments: Sequence[str]) -> int:
    """Run one of the two; problems go to stderr, exit code 2."""
    parser = argparse.ArgumentParser(
        prog="softgrpo kuberay", description="Kubernetes manifests for KubeRay 1.5 to 1.7."
    )
    parser.add_argument("action", choices=["render", "validate"], help="`softgrpo kuberay ACTION --help` says more")
    if parser.parse_args(arguments[:1]).action == "render":
        return _render(_render_parser().parse_intermixed_args(arguments[1:]))
    return _validate(_validate_parser().parse_args(arguments[1:]))


def validate_text(text: str, nodes: Mapping[str, Node], source: str) -> tuple[list[Problem], list[Problem], str]:
    """(problems, advice, oldest KubeRay release that knows every field) of a multi-document YAML text."""
    try:
        documents = [document for document in strict_yaml.load_all(text) if document is not None]
    except yaml.YAMLError as error:
        return [Problem(source, f"not YAML: {error}")], [], ""
    if not documents:
        return [Problem(source, "holds no document")], [], ""
    problems: list[Problem] = []
    advice: list[Problem] = []
    releases = ["1.5"]
    for number, document in enumerate(documents, start=1):
        name = _document_name(document, number)
        faults = list(_structure(document, nodes))
        if not faults:
            faults = list(object_is_named(document))
        if not faults and document["kind"] in RAY_KINDS:
            faults = [problem for rule in OPERATOR_RULES for problem in rule(document)]
            advice += [Problem(f"{name}: {p.path}", p.message) for rule in ADVICE for p in rule(document)]
            releases.append(newest_release_needed(compact_nodes()[document["kind"]], document))
        problems += [Problem(f"{name}: {problem.path}", problem.message) for problem in faults]
    return problems, advice, max(releases, key=release_order)


def _structure(document: Any, nodes: Mapping[str, Node]) -> Iterator[Problem]:
    if not isinstance(document, dict):
        yield Problem("document", "expected keys and values")
        return
    kind, version = document.get("kind"), document.get("apiVersion")
    if not isinstance(kind, str) or kind not in KINDS:
        yield Problem("kind", f"{kind!r} is not one of {', '.join(KINDS)}")
        return
    if version != KINDS[kind][0]:
        yield Problem("apiVersion", f"{version!r} is not {KINDS[kind][0]}")
    yield from (
        Problem(problem.path.removeprefix("."), problem.message) for problem in check(nodes[kind], document, "")
    )


def _document_name(document: Any, number: int) -> str:
    if isinstance(document, dict) and isinstance(document.get("metadata"), dict):
        return f"{document.get('kind')}/{document['metadata'].get('name')}"
    return f"document {number}"


def _validate(namespace: argparse.Namespace) -> int:
    nodes = dict(compact_nodes())
    try:
        if namespace.crd:
            nodes |= from_crd(namespace.crd)
        text = sys.stdin.read() if str(namespace.file) == "-" else namespace.file.read_text(encoding="utf-8")
    except SchemaError as error:
        raise ConfigError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{namespace.file}: cannot be read: {error}") from None
    problems, advice, release = validate_text(text, nodes, str(namespace.file))
    if namespace.kuberay and release_order(release or "1.5") > release_order(namespace.kuberay):
        problems.append(Problem("fields", f"need KubeRay {release}, the cluster has {namespace.kuberay}"))
    for item in advice:
        print(f"advice: {item}", file=sys.stderr)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return EXIT_CONFIG
    print(f"{namespace.file}: valid for KubeRay {release} and newer")
    return EXIT_DONE


def _render(namespace: argparse.Namespace) -> int:
    config = load_config(namespace.config, namespace.overrides)
    require_trainable(config)
    shape = _shape(namespace)
    base = render(config, shape)
    documents = base
    for name in namespace.overlay:
        documents = apply_overlay(documents, name, shape)
    problems, _, _ = validate_text(to_yaml(documents), compact_nodes(), str(namespace.config))
    if problems:
        raise ConfigError("\n".join(map(str, problems)))
    if namespace.output:
        write_base(base, namespace.output, namespace.overlay, shape)
        print(f"wrote {namespace.output}; apply it with: kubectl apply -k {namespace.output}", file=sys.stderr)
        return EXIT_DONE
    sys.stdout.write(to_yaml(documents))
    return EXIT_DONE


def _shape(namespace: argparse.Namespace) -> ClusterShape:
    memory = {}
    for entry in namespace.memory:
        pool, equals, amount = entry.partition("=")
        if not equals or pool not in (*POOLS, "head"):
            raise ConfigError(f"--memory {entry}: write POOL=AMOUNT with POOL one of head, {', '.join(POOLS)}")
        memory[pool] = amount
    return ClusterShape(
        kind=namespace.kind,
        namespace=namespace.namespace,
        image=namespace.image,
        verifier_image=namespace.verifier_image,
        claim=namespace.claim,
        mount=namespace.mount.rstrip("/"),
        working_dir=namespace.working_dir,
        gpus_per_node=namespace.gpus_per_node,
        memory=memory,
        backoff_limit=namespace.backoff_limit,
        deadline_s=namespace.deadline_s,
    )


def _render_parser() -> argparse.ArgumentParser:
    default = ClusterShape()
    parser = argparse.ArgumentParser(prog="softgrpo kuberay render", description="Print manifests for a recipe.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a YAML recipe (see configs/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    parser.add_argument("--kind", choices=RAY_KINDS, default="RayJob", help="RayCluster for long-lived use")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write a kustomize base instead of printing")
    parser.add_argument(
        "--overlay", action="append", default=[], metavar="NAME", help=f"repeatable: {', '.join(overlay_names())}"
    )
    parser.add_argument("--namespace", help="namespace of all objects")
    parser.add_argument("--image", help="default softgrpo:cuda with GPUs, else softgrpo:cpu")
    parser.add_argument("--verifier-image", default=default.verifier_image, help="default %(default)s")
    parser.add_argument("--claim", default=default.claim, help="ReadWriteMany claim (default %(default)s)")
    parser.add_argument("--mount", default=default.mount, help="where the claim is mounted (default %(default)s)")
    parser.add_argument("--working-dir", metavar="URI", help="code archive (default: code.zip on the claim)")
    parser.add_argument("--gpus-per-node", type=int, default=default.gpus_per_node, help="default %(default)s")
    parser.add_argument(
        "--memory", action="append", default=[], metavar="POOL=AMOUNT", help="memory per pod, repeatable"
    )
    parser.add_argument(
        "--backoff-limit", type=int, default=default.backoff_limit, help="retries (default %(default)s)"
    )
    parser.add_argument("--deadline-s", type=int, default=default.deadline_s, help="default %(default)s")
    return parser


def _validate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softgrpo kuberay validate",
        description="Check manifests against KubeRay's fields and the operator's rules.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="multi-document YAML, - for standard input")
    parser.add_argument(
        "--crd", type=Path, metavar="FILE", help="check against this full definition (file or directory)"
    )
    parser.add_argument("--kuberay", metavar="VERSION", help="refuse fields that this release does not know")
    return parser
