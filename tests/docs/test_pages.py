"""Links, quoted messages, metric names, keys and file names in the documentation exist in the code."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from orchestration.config import Config
from orchestration.kuberay_overlay import overlay_names
from orchestration.metrics_export import RAY_PREFIX, prometheus_name
from tests.docs.pages import PAGES, ROOT, blocks, first_cells

FOLDERS = ("orchestration", "learner", "rollout", "reward")
NOT_METRICS = {
    *("soft/token", "learner/learner", "learner/rank", "engine/<>", "generate/<>", "failed/<>", "lost/<>"),
    *("overlays/<>", "rl/pool", "softgrpo/pool", "task/<>/children"),
}
"""Texts of the shape `area/name` that are something else; whatever is not here must be documented."""
RAY_METRICS = ("ray_node_", "ray_object_store_memory")


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


@functools.cache
def texts(path: Path) -> list[str]:
    """String constants of a module except docstrings; `<>` stands for what an f-string fills in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "<>" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inside:
            found.append(node.value)
    return found


def logged_names() -> set[str]:
    """Metric names in the code; `<>` where a part is computed."""
    shape = re.compile(r"[a-z_]+/[a-z0-9_@<>/]+")
    names = {text for path in sources() for text in texts(path) if shape.fullmatch(text)}
    return {name for name in names if name not in NOT_METRICS and not name.endswith("/")}


def documented_names() -> set[str]:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = text[text.index("## All of them") :]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    return {re.sub(r"<[a-z]+>", "<>", name) for row in rows for name in re.findall(r"`([^`]+)`", row)}


def matches(name: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace("<>", r"[A-Za-z0-9_@<>/]+"), name) is not None


def test_every_logged_metric_is_documented() -> None:
    documented = documented_names()
    missing = [name for name in logged_names() if not any(matches(name, pattern) for pattern in documented)]
    computed = [name for name in missing if re.search(r"/[<>_]+$", name)]  # `objective/<>`: names stand elsewhere
    assert sorted(set(missing) - set(computed)) == []
    for name in computed:
        assert any(pattern.startswith(name.partition("<")[0]) for pattern in documented), name


def test_every_documented_metric_is_logged() -> None:
    """A name counts as logged when the code has it, or has its last part beside its computed area."""
    logged = logged_names()
    words = {text for path in sources() for text in texts(path)}
    stale = []
    for name in documented_names():
        area, _, last = name.partition("/")
        in_code = any(matches(known, name) or matches(name, known) for known in logged)
        if not in_code and not (last in words and any(known.startswith(f"{area}/<>") for known in logged)):
            stale.append(name)
    assert stale == []


def dashboard() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((ROOT / "configs" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    return tree


def test_dashboard_shows_metrics_that_exist() -> None:
    ours = documented_names()
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            for metric in re.findall(r"ray_[a-zA-Z0-9_]+", target["expr"]):
                known = any(
                    re.fullmatch(
                        re.escape(RAY_PREFIX + prometheus_name(name.replace("<>", "ANY"))).replace("ANY", r"\w+"),
                        metric,
                    )
                    for name in ours
                )
                assert known or metric.startswith(RAY_METRICS), metric


def test_dashboard_panels_do_not_overlap() -> None:
    places = set()
    for panel in dashboard()["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & places, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        places |= cells
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))


def quoted_messages() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### `(.+)`\n(.+(?:\n.+)*)", page, re.MULTILINE)
    return [heading for heading, body in sections if "(external)" not in body]


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_exist(message: str) -> None:
    parts = [re.escape(part) for part in message.split("…")]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(text) for path in sources() for text in texts(path)), message


def config_keys() -> set[str]:
    keys = set()

    def collect(section: Any, prefix: str) -> None:
        for name, field in section.model_fields.items():
            keys.add(prefix + name)
            if hasattr(field.annotation, "model_fields"):
                collect(field.annotation, f"{prefix}{name}.")

    collect(Config, "")
    return keys


def test_configuration_keys_exist() -> None:
    sections = "|".join(
        name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")
    )
    known = config_keys() | {"data.train.columns"}
    for page in PAGES:
        text = re.sub(r"^```python.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for key in re.findall(rf"(?<![\w/.])((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?![\w/(])", text):
            if key.split(".")[-1] not in ("py", "md", "yaml", "json", "path"):
                assert key in known, f"{page.name}: {key}"


def test_links_and_files_exist() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for file in re.findall(
            r"`((?:orchestration|learner|rollout|reward|configs|requirements|tests)/[\w/-]*(?:\.\w+|/))`", text
        ):
            assert (ROOT / file).exists(), f"{page.name}: {file}"


def test_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES if page.name != "README.md"} == set(re.findall(r"\]\((\w[\w-]*\.md)\)", index))


def test_overlays_are_listed() -> None:
    assert set(overlay_names()) <= set(first_cells(ROOT / "docs" / "kuberay.md"))


def test_recipes_are_listed() -> None:
    recipes = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert recipes <= set(first_cells(ROOT / "docs" / "recipes.md"))


def test_snippets_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three snippets of extending.md, registered and used through the public functions."""
    import torch

    from learner.advantage import ESTIMATORS, group_advantage
    from learner.likelihood import LIKELIHOODS, soft_log_ratio
    from reward.extraction import Answer
    from reward.rules import RULES, parse_rule

    for registry in (LIKELIHOODS, ESTIMATORS, RULES):
        for name in list(registry):
            monkeypatch.setitem(registry, name, registry[name])  # restores the registry afterwards
    snippets = blocks(ROOT / "docs" / "extending.md", "python")
    assert len(snippets) == 3
    before = {id(registry): set(registry) for registry in (LIKELIHOODS, ESTIMATORS, RULES)}
    try:
        for snippet in snippets:
            assert len([line for line in snippet.splitlines() if line.strip()]) <= 11
            exec(compile(snippet, "extending.md", "exec"), {})
        old = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, -1.0]])
        retained = torch.tensor([[True, True, True], [True, True, False]])
        arguments = (torch.zeros(2, 3), retained)
        same = soft_log_ratio(old, old, *arguments, likelihood="mean_probability")  # type: ignore[arg-type]
        assert torch.equal(same, torch.zeros(2))
        changed = soft_log_ratio(old + torch.randn(2, 3), old, *arguments, likelihood="mean_probability")  # type: ignore[arg-type]
        assert torch.isfinite(changed).all()
        rewards, groups = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        best = group_advantage(rewards, groups, estimator="best_of_group")  # type: ignore[arg-type]
        assert best.tolist() == [0.0, 0.5, 0.0, 0.0]
        (term, _) = parse_rule("starts_with + 0.1*format")
        answer = Answer(response_text="42 it is", answer_text="42 it is", finish_reason="stop")
        score = RULES[term.name].apply(answer, "42", ())
        assert score.reward == 1.0
        assert RULES[term.name].check_gold("") is not None
    finally:
        for registry in (LIKELIHOODS, ESTIMATORS, RULES):
            for name in set(registry) - before[id(registry)]:
                del registry[name]
