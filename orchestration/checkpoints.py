"""A folder of checkpoints on disk: written whole or not at all, in an order, with damage noticed.

    checkpoints/  step_000040/           manifest.json beside what it lists
                  step_000040.replaced/  an older one of that step, while its successor takes its place
                  .writing-000050/       not there yet

Everything is fsynced before the rename that makes a checkpoint visible, the manifest with sizes and digests last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
REPLACED = ".replaced"
LEFTOVERS = (".writing-*", ".step_*.universal")
"""What a killed writer leaves, and a learner that was killed while it converted a state (`learner.checkpoint`)."""
_NAME = re.compile(rf"step_(\d+)({re.escape(REPLACED)})?")


def name_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by its name."""
    return _order(checkpoint)[0]


def all_in(folder: Path) -> list[Path]:
    """Checkpoints from the oldest to the newest, whole or damaged; a replaced one comes before its successor."""
    return sorted((path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)), key=_order)


def _order(checkpoint: Path) -> tuple[int, bool]:
    found = _NAME.fullmatch(checkpoint.name)
    assert found is not None, checkpoint
    return int(found[1]), found[2] is None


def commit(aside: Path, final: Path) -> None:
    """fsync everything under `aside`, write its manifest, and rename it to `final`.

    An older one of that name stays readable, under a name that sorts before it, until the new one is there.
    """
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    entries = {str(path.relative_to(aside)): _size_and_digest(path) for path in files}
    for path in files:
        sync(path)
    (aside / MANIFEST).write_text(json.dumps({"files": entries}), encoding="utf-8")
    sync(aside / MANIFEST)
    for directory in [*(path for path in aside.rglob("*") if path.is_dir()), aside]:
        sync(directory)
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    aside.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove what a killed process never committed."""
    for leftover in [path for pattern in LEFTOVERS for path in folder.glob(pattern)]:
        logger.info("removing %s, which a killed process left", leftover)
        remove(leftover)


def settle(checkpoint: Path) -> Path:
    """A whole checkpoint that a run goes on from, alone under its step's name; its path from now on."""
    if checkpoint.name.endswith(REPLACED):
        final = checkpoint.with_name(checkpoint.name.removesuffix(REPLACED))
        remove(final)  # its successor, which is damaged
        checkpoint.rename(final)
        sync(final.parent)
        return final
    remove(checkpoint.with_name(checkpoint.name + REPLACED))
    return checkpoint


def prune(folder: Path, written: int, keep_last: int, kept: Collection[str]) -> None:
    """After step `written` was committed: keep it, the `keep_last` newest up to it, and those of the names `kept`.

    Newer ones are left of a history that this run went back behind, because they were damaged or its learner died:
    they go, so that none of them hides this one.
    """
    found = all_in(folder)
    older = [path for path in found if step_of(path) <= written]
    for path in [*found[len(older) :], *(path for path in older[:-keep_last] if path.name not in kept)]:
        remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a directory if it is there; what cannot be removed is logged and left."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint, onerror=_note_leftover)


def _note_leftover(_: object, path: str, failure: tuple[Any, BaseException, Any]) -> None:
    logger.warning("%s: cannot be removed: %s", path, failure[1])


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint (None: nothing): manifest, sizes, digests, links or paths that lead outside."""
    try:
        entries: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        wrong = next((wrong for name in entries if (wrong := _wrong(checkpoint, name, entries[name]))), None)
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"no readable manifest, or a file that cannot be read: {type(error).__name__}: {error}"
    if wrong:
        return wrong
    unknown = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {*entries, MANIFEST}
    return f"{sorted(unknown)[0]} is not in the manifest" if unknown else None


def _wrong(checkpoint: Path, name: str, expected: dict[str, Any]) -> str | None:
    path = checkpoint / name
    if path.is_symlink() or not path.resolve().is_relative_to(checkpoint.resolve()):
        return f"{name} leads outside"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["size"]:
        return f"{name} has {path.stat().st_size} bytes, expected {expected['size']}"
    return None if _size_and_digest(path) == expected else f"{name} has another digest"


def sync(path: Path) -> None:
    """Have a file's content, or a directory's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size_and_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = _digest(file)
    return {"size": path.stat().st_size, "blake2b": digest}


def _digest(file: IO[bytes]) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()  # type: ignore[arg-type]
