"""The uploaded code: what goes along, what stays behind, how large it may be, and that it is reproducible."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from orchestration.code_package import build_package, ignore_patterns, is_ignored, source_files
from orchestration.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("relative", "pattern", "ignored"),
    [
        ("tests/a.py", "/tests/", True),
        ("learner/tests/a.py", "/tests/", False),
        ("learner/__pycache__/a.pyc", "__pycache__/", True),
        ("notes/outputs", "/outputs/", False),
        ("models/a.safetensors", "*.safetensors", True),
        ("models/safetensors.py", "*.safetensors", False),
        ("weights.pt/readme", "*.pt", True),
        ("docs", "/docs/", False),
    ],
)
def test_patterns_mean_what_git_means(relative: str, pattern: str, ignored: bool) -> None:
    assert is_ignored(relative, [pattern]) is ignored


@pytest.mark.parametrize("pattern", ["!keep.py", "a/**/b", "tests/data/"])
def test_forms_that_we_do_not_read_are_refused(pattern: str, tmp_path: Path) -> None:
    (tmp_path / ".rayignore").write_text(pattern + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="plain forms only"):
        ignore_patterns(tmp_path)


def test_the_clone_sends_code_and_recipes_only() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in source_files(ROOT)}
    assert {"orchestration/config.py", "rollout/trajectory.py", "pyproject.toml"} <= names
    strays = [name for name in names if name.startswith((".git/", "tests/", "docs/", ".venv/", "outputs/"))]
    assert strays == []
    assert sum((ROOT / name).stat().st_size for name in names) < 5 * 2**20


def test_ray_itself_leaves_the_same_behind(tmp_path: Path) -> None:
    """`ray job submit --working-dir .` reads .rayignore and .gitignore on its own; both ways must agree."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    archive = tmp_path / "ray.zip"
    packaging.create_package(str(ROOT), archive, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(archive) as package:
        by_ray = {name for name in package.namelist() if not name.endswith("/")}
    ours = {path.relative_to(ROOT).as_posix() for path in source_files(ROOT)}
    assert {name.split("/")[0] for name in by_ray} == {name.split("/")[0] for name in ours}
    assert {name for name in by_ray if name.endswith((".py", ".yaml"))} == {
        name for name in ours if name.endswith((".py", ".yaml"))
    }


def small_clone(directory: Path) -> Path:
    (directory / "orchestration").mkdir(parents=True)
    (directory / "orchestration" / "code.py").write_text("x = 1\n", encoding="utf-8")
    (directory / "weights.safetensors").write_bytes(b"0" * 1000)
    (directory / ".rayignore").write_text("*.safetensors\n", encoding="utf-8")
    return directory


def test_packages_are_reproducible_and_hold_the_extra_files(tmp_path: Path) -> None:
    clone = small_clone(tmp_path / "clone")
    first = build_package(clone, tmp_path / "a.zip", {"submitted.yaml": b"name: a\n"})
    (clone / "orchestration" / "code.py").touch()
    second = build_package(clone, tmp_path / "b.zip", {"submitted.yaml": b"name: a\n"})
    assert first.path.read_bytes() == second.path.read_bytes()
    with zipfile.ZipFile(first.path) as archive:
        assert set(archive.namelist()) == {".rayignore", "orchestration/code.py", "submitted.yaml"}
        assert archive.read("submitted.yaml") == b"name: a\n"


def test_git_ignored_files_stay_behind(tmp_path: Path) -> None:
    clone = small_clone(tmp_path / "clone")
    (clone / ".gitignore").write_text("secret.env\n", encoding="utf-8")
    (clone / "secret.env").write_text("TOKEN=1", encoding="utf-8")
    subprocess.run(["git", "init", "-q", str(clone)], check=True, timeout=30)
    assert "secret.env" not in {path.name for path in source_files(clone)}


def test_links_out_of_the_clone_stay_behind(tmp_path: Path) -> None:
    clone = small_clone(tmp_path / "clone")
    (tmp_path / "private.txt").write_text("private", encoding="utf-8")
    (clone / "link.txt").symlink_to(tmp_path / "private.txt")
    assert "link.txt" not in {path.name for path in source_files(clone)}


def test_too_large_names_the_culprits(tmp_path: Path) -> None:
    clone = small_clone(tmp_path / "clone")
    (clone / "data.parquet").write_bytes(b"0" * 3 * 2**20)
    with pytest.raises(
        ConfigError, match=r"3 MiB exceed .* 2 MiB; add .* \.rayignore\. Largest: data\.parquet \(3\.0 MiB\)"
    ):
        build_package(clone, tmp_path / "a.zip", {}, limit=2 * 2**20)
