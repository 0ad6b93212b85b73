"""Imports go down only: orchestration -> learner, reward, rollout; learner -> definition modules of rollout."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("orchestration", "learner", "reward", "rollout")
LEARNER_MAY_IMPORT = (
    "rollout.trajectory",
    "rollout.trajectory_check",
    "rollout.soft_token",
    "rollout.weights",
    "rollout.transport",
    "rollout.nccl_transfer",
    "rollout.full_store",
    "rollout.lean_imports",
)


def imported_modules(path: Path) -> list[str]:
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            modules.append(node.module or "")
    return [name for name in modules if name.split(".")[0] in (*FOLDERS, "tests")]


def allowed(folder: str, module: str) -> bool:
    target = module.split(".")[0]
    if target == folder:
        return True
    if folder == "orchestration":
        return target in FOLDERS
    return folder == "learner" and module in LEARNER_MAY_IMPORT


@pytest.mark.parametrize("path", sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.py")), ids=lambda p: p.name)
def test_imports_go_down_only(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    wrong = [name for name in imported_modules(path) if not allowed(folder, name)]
    assert not wrong, f"{folder}/{path.name} may not import {wrong}"


@pytest.mark.parametrize(
    ("folder", "module", "expected"),
    [
        ("rollout", "learner.head", False),
        ("reward", "rollout.trajectory", False),
        ("learner", "rollout.engine", False),
        ("learner", "rollout.weights", True),
        ("orchestration", "reward.actor", True),
        ("rollout", "tests.rollout", False),
    ],
)
def test_the_rule_itself(folder: str, module: str, expected: bool) -> None:
    assert allowed(folder, module) is expected
