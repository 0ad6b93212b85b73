"""The code of a submitted job: the clone without history, tests, outputs and weights, as one reproducible zip.

What git ignores and what `.rayignore` names stays behind. Equal content gives an equal file (sorted names, fixed
times), so Ray recognises an upload that it already has.
"""

from __future__ import annotations

import fnmatch
import os
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from orchestration.config import ConfigError

UPLOAD_LIMIT = 500 * 2**20
"""Bytes; Ray refuses more (its largest gRPC message)."""
WARN_ABOVE = 25 * 2**20
"""Bytes; code and recipes are well under 1 MiB, so something else slipped in."""
GIT_DEADLINE_S = 30
EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class CodePackage:
    """A zip on disk: path, size in bytes, and the largest files in it (name, bytes)."""

    path: Path
    num_bytes: int
    num_files: int
    largest: tuple[tuple[str, int], ...]

    def describe_largest(self) -> str:
        """`name (12.3 MiB), ...` for messages."""
        return ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in self.largest)


def build_package(root: Path, target: Path, extra: Mapping[str, bytes], *, limit: int = UPLOAD_LIMIT) -> CodePackage:
    """Zip the clone at `root` and the `extra` files into `target`. Raises `ConfigError` above `limit` bytes of content.

    The limit applies to the uncompressed content: what matters is what was meant to be left out, not how well it packs.
    """
    files = [(path.relative_to(root).as_posix(), path) for path in source_files(root)]
    sizes = {name: path.stat().st_size for name, path in files} | {name: len(data) for name, data in extra.items()}
    largest = tuple(sorted(sizes.items(), key=lambda item: -item[1])[:5])
    total = sum(sizes.values())
    if total > limit:
        listing = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in largest)
        raise ConfigError(
            f"--working-dir {root}: {total / 2**20:.0f} MiB exceed Ray's upload limit of {limit / 2**20:.0f} MiB; add "
            f"what the job does not need to .rayignore. Largest: {listing}"
        )
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files:
            if name not in extra:
                archive.writestr(_entry(name, executable=os.access(path, os.X_OK)), path.read_bytes())
        for name, data in sorted(extra.items()):
            archive.writestr(_entry(name), data)
    return CodePackage(target, target.stat().st_size, len(sizes), largest)


def source_files(root: Path) -> list[Path]:
    """Files of the clone that a job needs, sorted; without git everything that `.rayignore` does not name."""
    patterns = ignore_patterns(root)
    listed = _git_files(root)
    candidates = listed if listed is not None else sorted(_walk(root, root, patterns))
    return [path for path in candidates if not is_ignored(path.relative_to(root).as_posix(), patterns)]


def ignore_patterns(root: Path) -> list[str]:
    """Patterns of `.rayignore`. Raises `ConfigError` for forms that Ray would read differently than we do."""
    file = root / ".rayignore"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else [".git/", ".venv/"]
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for pattern in patterns:
        if pattern.startswith("!") or "**" in pattern or "/" in pattern.strip("/"):
            raise ConfigError(f".rayignore: {pattern}: use plain forms only: name, name/, *.suffix, /top")
    return patterns


def is_ignored(relative: str, patterns: list[str]) -> bool:
    """Whether a file (path relative to the root) or a directory above it matches."""
    parts = PurePosixPath(relative).parts
    for pattern in patterns:
        name = pattern.strip("/")
        places = parts[:1] if pattern.startswith("/") else parts
        if pattern.endswith("/") and len(places) == len(parts):
            places = places[:-1]  # the last part is a file
        if any(fnmatch.fnmatchcase(part, name) for part in places):
            return True
    return False


def _git_files(root: Path) -> list[Path] | None:
    """What git tracks or would track; None outside of a work tree."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z", "."]
    try:
        listed = subprocess.run(command, capture_output=True, timeout=GIT_DEADLINE_S, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if listed.returncode != 0:
        return None
    paths = [root / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    return sorted({path for path in paths if path.is_file() and not path.is_symlink()})


def _walk(directory: Path, root: Path, patterns: list[str]) -> Iterator[Path]:
    for path in directory.iterdir():
        if path.is_symlink():
            continue
        if path.is_file():
            yield path
        elif not is_ignored(f"{path.relative_to(root).as_posix()}/x", patterns):
            yield from _walk(path, root, patterns)


def _entry(name: str, *, executable: bool = False) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (0o755 if executable else 0o644) << 16
    return entry
