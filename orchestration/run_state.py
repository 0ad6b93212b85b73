"""The run directory: lease, resolved configuration, atomic checkpoints.

    outputs/<name>/  config.yaml  summary.json  metrics.jsonl  groups.jsonl  trajectories/  plots/  driver.lock
                     checkpoints/step_000040/{learner/, run_state.json, manifest.json}

A checkpoint is written aside, every file and directory is fsynced, the manifest with sizes and digests is written last,
and one rename makes it visible: a reader sees all of it or nothing. The newest checkpoint whose digests hold is loaded;
damaged ones are named and passed over, never unpickled. A disk that takes no more costs the new checkpoint only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from learner.spec import CheckpointNotWritten
from orchestration.config import Config, ConfigError, dump_config
from orchestration.failures import RunDirectoryBusy, RunError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
RUN_STATE = "run_state.json"
BEST = "best.json"


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything of the driver that a resumed run needs; the learner's part lies beside it."""

    step: int
    """Training steps that the learner's state contains."""
    version: int
    """Policy version that those weights were published as; a resumed run continues above it."""
    stream: dict[str, Any]
    """Cursor of the prompt stream."""
    pending: tuple[tuple[str, int], ...] = ()
    """(prompt id, visit) of every group that was issued and not trained: issued again first."""
    counts: dict[str, int] = field(default_factory=dict)
    """Outcomes of all groups so far (trained, dropped/..., failed/...)."""
    format_version: int = FORMAT_VERSION


class RunDirectory:
    """One run's files; hold `lease()` while writing."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.checkpoints = self.path / "checkpoints"
        self._held: list[int] = []
        """Steps whose checkpoints are not pruned yet."""

    def create(self, config: Config, *, resume: bool) -> None:
        """Make the directory and save the resolved configuration.

        Raises `ConfigError` when it holds a run and `resume` is off, or holds none and `resume` is on.
        """
        existing = bool(self._all()) or (self.path / "metrics.jsonl").exists()
        if existing and not resume:
            raise ConfigError(
                f"output_dir={self.path}: holds a run already; add --resume to continue it, set another name or "
                "output_dir, or remove the directory"
            )
        if resume and not self.path.is_dir():
            raise ConfigError(f"output_dir={self.path}: nothing to resume there; leave --resume out to start the run")
        for name in ("checkpoints", "trajectories", "plots"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "config.yaml", dump_config(config).encode())

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the directory for this process; the operating system frees it however the process ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "driver.lock").open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise RunDirectoryBusy(
                    f"{self.path}: another driver ({lock.read().strip()}) writes this run; stop it first, or give this "
                    "run another name"
                ) from None
            lock.truncate(0)
            lock.write(f"pid {os.getpid()} on {os.uname().nodename}")
            lock.flush()
            yield

    @contextmanager
    def new_checkpoint(self, state: RunState, keep_last: int) -> Iterator[Path]:
        """Yields the directory to fill; commits it when the block ends, leaves no trace when it raises.

        Raises `CheckpointNotWritten` where the disk does not take it.
        """
        aside = self._aside(state.step)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            yield aside
            (aside / RUN_STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
            commit(aside, self.checkpoints / _name(state.step))
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointNotWritten(f"{self.checkpoints}: {error}") from error
            raise
        self._prune(keep_last)

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are logged and passed over."""
        for path in reversed(self._all()):
            if problem := damage(path):
                logger.warning("checkpoint %s is damaged (%s); trying the one before", path.name, problem)
                continue
            return path
        return None

    def resume_point(self) -> Path | None:
        """Where a resumed run goes on; None where no checkpoint was ever written.

        Raises `ConfigError` where all are damaged: starting over must be somebody's decision.
        """
        checkpoint = self.latest_checkpoint()
        if checkpoint is None and self._all():
            raise ConfigError(
                f"{self.checkpoints}: none of the {len(self._all())} checkpoints is whole; restore one from a copy, or "
                "remove the run directory to start over"
            )
        return checkpoint

    def checkpoint_of(self, step: int) -> Path | None:
        """The checkpoint of the step that this run last committed; None at step 0, where there is none.

        Raises `RunError` when it was damaged since: going on from an older one is what a resumed run does.
        """
        if step == 0:
            return None
        path = self.checkpoints / _name(step)
        if problem := damage(path):
            raise RunError(f"checkpoint {path.name} is damaged ({problem}); --resume goes on from the one before it")
        return path

    @contextmanager
    def holding(self, step: int) -> Iterator[None]:
        """The checkpoint of this step, written already or not, is not pruned inside the block."""
        self._held.append(step)
        try:
            yield
        finally:
            self._held.remove(step)

    def is_writing(self, step: int) -> bool:
        """Whether a checkpoint of this step is being written."""
        return self._aside(step).exists()

    def mark_best(self, checkpoint: Path, score: float) -> None:
        """Protect this checkpoint from pruning until a better one comes."""
        write_atomically(self.checkpoints / BEST, json.dumps({"name": checkpoint.name, "score": score}).encode())

    def best(self) -> tuple[Path, float] | None:
        """The checkpoint with the best evaluation so far."""
        try:
            record = json.loads((self.checkpoints / BEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return self.checkpoints / str(record["name"]), float(record["score"])

    def _all(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step_*"))

    def _aside(self, step: int) -> Path:
        return self.checkpoints / f".writing-{step:06d}"

    def _prune(self, keep_last: int) -> None:
        best = self.best()
        kept = {best[0].name} if best else set()
        kept.update(_name(step) for step in self._held)
        for path in self._all()[:-keep_last]:
            if path.name not in kept:
                shutil.rmtree(path, onerror=_note_leftover)


def _note_leftover(_: object, path: str, failure: tuple[Any, BaseException, Any]) -> None:
    logger.warning("%s: an old checkpoint cannot be removed: %s", path, failure[1])


def _name(step: int) -> str:
    return f"step_{step:06d}"


def load_state(checkpoint: Path) -> RunState:
    """Read the driver's part of a checkpoint that `damage` found whole."""
    record = json.loads((checkpoint / RUN_STATE).read_text(encoding="utf-8"))
    if record["format_version"] != FORMAT_VERSION:
        raise ConfigError(
            f"{checkpoint}: checkpoint format {record['format_version']}, this program reads {FORMAT_VERSION}; "
            "resume with the release that wrote it"
        )
    record["pending"] = tuple((str(prompt), int(visit)) for prompt, visit in record["pending"])
    return RunState(**record)


def commit(aside: Path, final: Path) -> None:
    """fsync everything under `aside`, write its manifest, and rename it to `final`.

    An older one of that name stays readable, under a name that sorts behind it, until the new one is there.
    """
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    entries = {str(path.relative_to(aside)): _size_and_digest(path) for path in files}
    for path in files:
        _sync(path)
    (aside / MANIFEST).write_text(json.dumps({"files": entries}), encoding="utf-8")
    _sync(aside / MANIFEST)
    for directory in [*(path for path in aside.rglob("*") if path.is_dir()), aside]:
        _sync(directory)
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    aside.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint (None: nothing): manifest, sizes, digests, links or paths that lead outside."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable manifest: {error}"
    for name, expected in entries.items():
        path = checkpoint / name
        if path.is_symlink() or not path.resolve().is_relative_to(checkpoint.resolve()):
            return f"{name} leads outside"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['size']}"
        if _size_and_digest(path) != expected:
            return f"{name} has another digest"
    unknown = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {*entries, MANIFEST}
    return f"{sorted(unknown)[0]} is not in the manifest" if unknown else None


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a small file so that a reader sees the old or the new content, also after a crash."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_bytes(content)
    _sync(aside)
    aside.replace(path)
    _sync(path.parent)


def _size_and_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = _digest(file)
    return {"size": path.stat().st_size, "blake2b": digest}


def _digest(file: IO[bytes]) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()  # type: ignore[arg-type]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
