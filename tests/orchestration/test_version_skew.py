"""Fault matrix row 26: whatever was written or is served by another version is refused with both versions named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestration.config import ConfigError, load_config
from orchestration.run_state import FORMAT_VERSION, RUN_STATE, load_state


def test_a_checkpoint_of_another_format(tmp_path: Path) -> None:
    record = {"format_version": FORMAT_VERSION + 1, "step": 3, "version": 3, "stream": {}, "pending": []}
    (tmp_path / RUN_STATE).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"format {FORMAT_VERSION + 1}, this program reads {FORMAT_VERSION}"):
        load_state(tmp_path)


def test_a_recipe_with_a_key_of_another_release(tmp_path: Path) -> None:
    recipe = tmp_path / "old.yaml"
    recipe.write_text(
        "name: a\nmodel: {path: m}\ndata: {train: {path: d}}\nalgorithm: {liklihood: censored}\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"algorithm\.liklihood.*unknown key; did you mean likelihood"):
        load_config(recipe)


def test_manifests_name_the_ray_that_the_locks_install() -> None:
    from orchestration.kuberay import RAY_VERSION

    root = Path(__file__).resolve().parents[2]
    for lock in ("cpu.lock", "cuda.lock"):
        lines = (root / "requirements" / lock).read_text(encoding="utf-8").splitlines()
        assert f"ray=={RAY_VERSION}" in [line.replace("[default]", "") for line in lines]
