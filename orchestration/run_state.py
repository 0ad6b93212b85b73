"""The run directory: lease, resolved configuration, atomic checkpoints.

    outputs/<name>/  config.yaml  summary.json  metrics.jsonl  groups.jsonl  tracking.json  driver.log  driver.lock
                     trajectories/  plots/  evaluations/
                     checkpoints/step_000040/{learner/, run_state.json, config.yaml, tracking.json, manifest.json}

`groups.jsonl` has a line for every trained step (`groups_log`). A checkpoint is written aside and one rename makes it
visible: a reader sees all of it or nothing (`checkpoints`). The newest checkpoint whose digests hold is loaded; damaged
ones are named and passed over, never unpickled. A disk that takes no more costs the new checkpoint only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from learner.spec import CheckpointNotWritten
from orchestration.checkpoints import all_in, commit, damage, name_of, prune, settle, sync, tidy
from orchestration.config import Config, ConfigError, dump_config
from orchestration.failures import RunDirectoryBusy, RunError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
RUN_STATE = "run_state.json"
BEST = "best.json"
LOCK = "driver.lock"
COPIED = ("config.yaml", "tracking.json")
"""Files of the run that every checkpoint holds too."""
MARKS = (LOCK, "config.yaml", "metrics.jsonl", "checkpoints")
"""Any of them means that a driver was here: the run can be resumed, at worst from its beginning."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that does not lock files."""


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
        self.flush: Callable[[], None] = lambda: None
        """Has on disk what `COPIED` refers to; called before a checkpoint is committed."""
        self.last: Path | None = None
        """The checkpoint that this process wrote last or went on from."""
        self._held: list[int] = []
        """Steps whose checkpoints are not pruned yet."""
        self._writing: list[int] = []
        """Steps whose checkpoints are being written."""

    def check(self, *, resume: bool) -> None:
        """Raise `ConfigError` when it holds a run and `resume` is off, or none and `resume` is on; makes nothing.

        An empty directory counts as a run that has not begun: somebody made a place for it.
        """
        if not resume and (all_in(self.checkpoints) or (self.path / "metrics.jsonl").exists()):
            raise ConfigError(
                f"output_dir={self.path}: holds a run already; add --resume to continue it, set another name or "
                "output_dir, or remove the directory"
            )
        if resume and not self.is_run() and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise ConfigError(
                f"output_dir={self.path}: nothing to resume there; correct name or output_dir, or leave --resume out "
                "to start the run"
            )

    def is_run(self) -> bool:
        """Whether a driver ever held this directory: its run can be resumed."""
        return any((self.path / mark).exists() for mark in MARKS)

    def create(self, config: Config, *, resume: bool) -> None:
        """Make the directory and save the resolved configuration; raises as `check` does."""
        self.check(resume=resume)
        for name in ("checkpoints", "trajectories", "plots"):
            _make_directory(self.path / name)
        write_atomically(self.path / "config.yaml", dump_config(config).encode())

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the directory for this process, without what a killed one left half done.

        The operating system frees it however the process ends. Raises `RunDirectoryBusy` where another holds it, and
        `RunError` where nobody can.
        """
        _make_directory(self.path)
        with (self.path / LOCK).open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise RunDirectoryBusy(
                    f"{self.path}: another driver ({lock.read().strip()}) writes this run; stop it first, or give this "
                    "run another name"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                raise RunError(_no_locks(self.path, error)) from None
            lock.truncate(0)
            lock.write(f"pid {os.getpid()} on {os.uname().nodename}")
            lock.flush()
            tidy(self.checkpoints)
            yield

    @contextmanager
    def new_checkpoint(self, state: RunState, keep_last: int) -> Iterator[Path]:
        """Yields the directory to fill; commits it when the block ends, leaves no trace when it raises.

        The block may be left on another thread than it was entered on. Raises `CheckpointNotWritten` where the disk
        does not take it.
        """
        aside, final = self.checkpoints / f".writing-{state.step:06d}", self.checkpoints / name_of(state.step)
        self._writing.append(state.step)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            yield aside
            (aside / RUN_STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
            self.flush()
            for name in COPIED:
                if (self.path / name).is_file():
                    (aside / name).write_bytes((self.path / name).read_bytes())
            commit(aside, final)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointNotWritten(f"{self.checkpoints}: {error}") from error
            raise
        finally:
            self._writing.remove(state.step)
        self.last = final
        # In this order: a step that is held no more was marked before.
        held = [name_of(step) for step in tuple(self._held)]
        best = self.best()
        prune(self.checkpoints, state.step, keep_last, {*held, *([best[0].name] if best else [])})

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are logged and passed over."""
        for path in reversed(all_in(self.checkpoints)):
            if problem := damage(path):
                logger.warning("checkpoint %s is damaged (%s); trying the one before", path.name, problem)
                continue
            return path
        return None

    def resume_point(self) -> Path | None:
        """Where a resumed run goes on; None where no checkpoint was ever written. Hold the lease.

        Raises `ConfigError` where all are damaged: starting over must be somebody's decision.
        """
        checkpoint = self.latest_checkpoint()
        if checkpoint is not None:
            self.last = settle(checkpoint)
        elif found := all_in(self.checkpoints):
            raise ConfigError(
                f"{self.checkpoints}: none of the {len(found)} checkpoints is whole; restore one from a copy, or "
                "remove the run directory to start over"
            )
        return self.last

    def checkpoint_of(self, step: int) -> Path | None:
        """The checkpoint of the step that this run last committed; None at step 0, where there is none.

        Raises `RunError` when it was damaged since: going on from an older one is what a resumed run does.
        """
        if step == 0:
            return None
        path = self.checkpoints / name_of(step)
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
        """Whether this process is writing a checkpoint of this step."""
        return step in self._writing

    def mark_best(self, checkpoint: Path, score: float) -> None:
        """Protect this checkpoint from pruning until a better one comes."""
        write_atomically(self.checkpoints / BEST, json.dumps({"name": checkpoint.name, "score": score}).encode())

    def best(self) -> tuple[Path, float] | None:
        """The checkpoint with the best evaluation so far, and its score; None without one, or when it is gone."""
        try:
            record = json.loads((self.checkpoints / BEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        checkpoint = self.checkpoints / str(record["name"])
        return (checkpoint, float(record["score"])) if checkpoint.is_dir() else None


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


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a small file so that a reader sees the old or the new content, also after a crash."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_bytes(content)
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def _make_directory(path: Path) -> None:
    """With its parents; their entries survive a power cut."""
    made = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in made:
        sync(place.parent)


def _no_locks(path: Path, error: OSError) -> str:
    mount = next(place for place in (path, *path.parents) if place.is_mount())
    return (
        f"{path}: the file system at {mount} does not lock files ({error.strerror}), so nothing would keep a second "
        "driver out; set output_dir to storage with locks, or mount it with them (NFS: a running lock service and no "
        "`nolock`; Lustre: -o flock)"
    )
