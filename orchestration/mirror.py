"""The thread that tails the metrics log into MLflow, with a cursor that survives restarts.

It batches, backs off exponentially, gives up on a server that refuses the credentials, and is the only one who waits.
The cursor moves only behind lines that the sink has accepted: an outage costs lag, a crash at most one repeated batch.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from orchestration.metrics_log import complete_lines
from orchestration.mlflow_sink import RunDescription, SinkRefused, SinkRejected, SinkUnavailable
from orchestration.redaction import redact_text
from orchestration.run_state import write_atomically

FinalStatus = Literal["FINISHED", "KILLED", "FAILED"]
STATE = "tracking.json"
METRICS = "metrics.jsonl"
POLL_S = 1.0
LINES_PER_BATCH = 50
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
WARN_EVERY_S = 60.0
logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where the mirror sends to; see `MlflowSink`."""

    def start(self, run: RunDescription) -> str: ...
    def log_records(self, records: Sequence[Mapping[str, Any]]) -> None: ...
    def log_artifact(self, path: Path, folder: str) -> None: ...
    def register_model(self, name: str, directory: Path) -> None: ...
    def finish(self, status: str) -> None: ...


@dataclass(slots=True)
class MirrorState:
    """What survives a restart, in `tracking.json` of the run directory; every checkpoint has a copy."""

    run_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    destination: str = ""
    """Digest of the tracking URI: another server gets the whole history."""
    run_id: str | None = None
    cursor: int = 0
    """Bytes of metrics.jsonl that were delivered."""
    delivered_step: int = 0
    attempt: int = 0
    final_status: FinalStatus | None = None
    """How the last attempt ended, for the mirror to report."""
    artifacts: list[tuple[str, str]] = field(default_factory=list)
    """(path, folder) of files not delivered yet."""
    model: tuple[str, str] | None = None
    """(name, directory) of an exported model not registered yet."""

    @classmethod
    def load(cls, run_dir: Path, checkpoint: Path | None = None) -> MirrorState:
        """The state of earlier attempts, where that is damaged or gone the one of `checkpoint`, or a new one.

        Its cursor fits the metrics log: a power cut may have taken lines from that which were delivered.
        """
        files = [place / STATE for place in (run_dir, checkpoint) if place is not None]
        state = next(filter(None, map(cls._read, files)), None)
        if state is None:
            return cls()
        state.cursor = _line_start(run_dir / METRICS, state.cursor)
        return state

    @classmethod
    def _read(cls, path: Path) -> MirrorState | None:
        if not path.is_file():
            return None
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            tree["artifacts"] = [(file, folder) for file, folder in tree["artifacts"]]
            return cls(**tree)
        except (ValueError, TypeError, KeyError) as error:
            logger.error("%s: damaged (%s); a checkpoint's copy is taken, or the run is new to MLflow", path, error)
            return None

    def save(self, run_dir: Path) -> None:
        """Replace the file atomically, on disk when this returns."""
        write_atomically(run_dir / STATE, json.dumps(asdict(self)).encode())


def _line_start(path: Path, cursor: int) -> int:
    """The last offset up to `cursor` at which a line of a file begins, or would begin."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return file.read(cursor).rfind(b"\n") + 1


class Mirror:
    """The thread that tails the metrics log into a sink."""

    def __init__(self, sink: Sink, run: RunDescription, state: MirrorState, run_dir: Path) -> None:
        self._sink = sink
        self._run = run
        self._state = state
        self._run_dir = run_dir
        self._metrics_file = run_dir / METRICS
        self._lock = threading.Lock()
        """Guards `state.artifacts` and `state.final_status`, which the caller changes, and the saving of the state."""
        self._started = False
        self._refused = False
        self._failures = 0
        self._warned_at = -WARN_EVERY_S
        self._unsaved = False
        self._closing = False
        self._abandoned = False
        """Closing took too long: a call that still hangs must change nothing when it returns."""
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run_forever, name="mlflow-mirror", daemon=True)

    @property
    def delivered_step(self) -> int:
        """The newest step that the sink has."""
        return self._state.delivered_step

    @property
    def run_id(self) -> str | None:
        """The run in the sink, once it has answered."""
        return self._state.run_id if self._started else None

    def start(self) -> None:
        """Start mirroring."""
        self._thread.start()

    def add_artifact(self, path: Path, folder: str) -> None:
        """Queue a file; the state file keeps it until it is delivered."""
        with self._lock:
            self._state.artifacts.append((str(path), folder))
            self._unsaved = True

    def set_model(self, name: str, directory: Path) -> None:
        """Have a model registered once everything else is delivered."""
        with self._lock:
            self._state.model = (name, str(directory))
            self._unsaved = True

    def close(self, status: FinalStatus, timeout_s: float) -> bool:
        """Deliver what is left within `timeout_s`; what is not delivered is kept, and False returned."""
        with self._lock:
            self._state.final_status = status
        self.save()
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        with self._lock:
            self._abandoned = self._thread.is_alive()
        complete = not self._abandoned and self._is_drained()
        if not complete and not self._refused:
            logger.warning(
                "MLflow did not take everything in time; metrics.jsonl has all of it, and the next attempt of this run "
                "(or `python -m orchestration.tracking %s`) sends the rest",
                self._run_dir,
            )
        return complete

    def _run_forever(self) -> None:
        while not (self._refused or self._abandoned):
            pause = POLL_S
            try:
                self._deliver()
                self._failures = 0
                if self._closing and not self._abandoned and self._is_drained():
                    self._sink.finish(self._state.final_status or "KILLED")
                    return
            except (SinkUnavailable, OSError) as error:
                pause = self._after_failure(error)
            except (SinkRefused, SinkRejected) as error:  # as a whole: what it rejects in a run is passed over
                self._refused = True
                logger.error("MLflow refuses this run (%s); metrics.jsonl goes on without it", error)
            if self._closing and self._failures:
                return
            self._wake.wait(pause)

    def _after_failure(self, error: SinkUnavailable | OSError) -> float:
        self._failures += 1
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self._failures - 1))
        if time.monotonic() - self._warned_at >= WARN_EVERY_S:
            self._warned_at = time.monotonic()
            what = "MLflow is not reachable" if isinstance(error, SinkUnavailable) else "MLflow gets nothing from here"
            logger.warning("%s (%s); metrics wait in metrics.jsonl, trying again", what, error)
        return pause

    def _deliver(self) -> None:
        if self._unsaved:
            self.save()
        if not self._started:
            self._state.run_id = self._sink.start(self._run)
            self._started = True
            self.save()
        while not self._abandoned and self._deliver_batch():
            pass
        while not self._abandoned and self._state.artifacts:
            self._deliver_artifact(*self._state.artifacts[0])
        if not self._abandoned and self._state.model is not None:
            self._register_model(*self._state.model)

    def _deliver_batch(self) -> bool:
        """Send the next lines of the log; False if there are none."""
        if not self._metrics_file.is_file():
            return False
        with self._metrics_file.open("rb") as file:
            file.seek(self._state.cursor)
            lines = list(islice(complete_lines(file), LINES_PER_BATCH))
        if not lines:
            return False
        records = [record for _, record in lines if record]
        try:
            self._sink.log_records(records)
        except SinkRejected as error:
            logger.error(
                "MLflow rejected %d lines of metrics from offset %d: %s", len(lines), self._state.cursor, error
            )
        self._state.cursor = lines[-1][0]
        self._state.delivered_step = max([self._state.delivered_step, *(record["step"] for record in records)])
        self.save()
        return True

    def _deliver_artifact(self, path: str, folder: str) -> None:
        if Path(path).is_file():
            try:
                self._sink.log_artifact(Path(path), folder)
            except SinkRejected as error:
                logger.error("MLflow rejected %s: %s", path, error)
        else:
            logger.warning("%s vanished before it could be uploaded", path)
        with self._lock:
            self._state.artifacts.remove((path, folder))
        self.save()

    def _register_model(self, name: str, directory: str) -> None:
        try:
            self._sink.register_model(name, Path(directory))
        except SinkRejected as error:
            logger.error("MLflow rejected the model %s: %s", name, error)
        with self._lock:
            self._state.model = None
        self.save()

    def _is_drained(self) -> bool:
        size = self._metrics_file.stat().st_size if self._metrics_file.is_file() else 0
        return self._state.cursor >= size and not self._state.artifacts and self._state.model is None

    def save(self) -> None:
        """Have the state on disk as it is now (the thread does so after every delivery)."""
        with self._lock:
            if self._abandoned:
                return
            try:
                self._state.save(self._run_dir)
                self._unsaved = False
            except OSError as error:
                logger.error("%s: cannot be written: %s", self._run_dir / STATE, redact_text(str(error)))
