"""Telemetry of a run: `metrics.jsonl` is the truth, MLflow a mirror that may be down, slow or restarted.

    controller --log()--> metrics.jsonl --mirror thread, cursor in tracking.json--> MLflow

Invariants: `log` never waits for a disk or a network; nothing that MLflow does reaches the caller; the cursor moves
only behind lines that MLflow has accepted, so an outage costs lag and a crash at most one repeated batch; one logical
run is one MLflow run over all its attempts; secrets are hidden before anything leaves.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from orchestration.config import Config, load_config
from orchestration.metrics_log import MetricsLog, complete_lines
from orchestration.mlflow_sink import (
    MlflowSink,
    RunDescription,
    SinkRefused,
    SinkRejected,
    SinkUnavailable,
    flatten,
)
from orchestration.provenance import provenance_tags
from orchestration.redaction import redact, redact_text

FinalStatus = Literal["FINISHED", "KILLED", "FAILED"]
POLL_S = 1.0
LINES_PER_BATCH = 50
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
WARN_EVERY_S = 60.0
CLOSE_S = 5.0
logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where the mirror sends to; see `MlflowSink`."""

    def start(self, run: RunDescription) -> str: ...
    def log_records(self, records: Sequence[Mapping[str, Any]]) -> None: ...
    def log_artifact(self, path: Path, folder: str) -> None: ...
    def finish(self, status: str) -> None: ...


@dataclass(slots=True)
class MirrorState:
    """What survives a restart, in `tracking.json`."""

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

    @classmethod
    def load(cls, path: Path) -> MirrorState:
        """The state of earlier attempts, or a new one."""
        if not path.is_file():
            return cls()
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**tree, "artifacts": [(file, folder) for file, folder in tree["artifacts"]]})
        except (ValueError, TypeError, KeyError) as error:
            logger.error("%s: damaged (%s); the run gets a new entry in MLflow", path, error)
            return cls()

    def save(self, path: Path) -> None:
        """Replace the file atomically."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(temporary, path)


class Tracker:
    """What the controller logs to; `open` once per attempt, `close` once."""

    def __init__(self, log: MetricsLog, mirror: Mirror | None) -> None:
        self._log = log
        self._mirror = mirror
        self._last_step = 0

    @classmethod
    def open(
        cls, config: Config, *, tags: Mapping[str, str] | None = None, datasets: Sequence[tuple[str, str, str]] = ()
    ) -> Tracker:
        """Start logging into the run directory of `config`, and mirroring unless `tracking.mlflow` is false.

        `datasets` are (name, digest, path).
        """
        run_dir = config.run_dir.absolute()
        run_dir.mkdir(parents=True, exist_ok=True)
        state_file = run_dir / "tracking.json"
        state = MirrorState.load(state_file)
        state.attempt += 1
        state.final_status = None
        state.save(state_file)
        log = MetricsLog(run_dir / "metrics.jsonl", attempt=state.attempt)
        if not config.tracking.mlflow:
            return cls(log, None)
        return cls(log, _start_mirror(config, state, run_dir, tags or {}, datasets))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics (`area/name`) of a step; returns at once."""
        self._last_step = max(self._last_step, step)
        if self._mirror is not None:
            metrics = {**metrics, "tracking/lag_steps": max(0, self._last_step - 1 - self._mirror.delivered_step)}
        self._log.append(metrics, step)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Have a finished file of the run directory uploaded into a folder of the MLflow run; returns at once."""
        if self._mirror is not None:
            self._mirror.add_artifact(path.absolute(), folder)

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run, once the server has answered."""
        return self._mirror.run_id if self._mirror else None

    def flush(self) -> None:
        """Have all metrics on disk (a checkpoint calls this)."""
        self._log.flush()

    def close(self, status: FinalStatus) -> None:
        """Write everything, give the mirror at most five seconds, and stop."""
        self._log.close()
        if self._mirror is not None:
            self._mirror.close(status, CLOSE_S)


class Mirror:
    """The thread that tails the metrics log into a sink."""

    def __init__(self, sink: Sink, run: RunDescription, state: MirrorState, run_dir: Path) -> None:
        self._sink = sink
        self._run = run
        self._state = state
        self._state_file = run_dir / "tracking.json"
        self._metrics_file = run_dir / "metrics.jsonl"
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

    def close(self, status: FinalStatus, timeout_s: float) -> bool:
        """Deliver what is left within `timeout_s`; what is not delivered is kept, and False returned."""
        with self._lock:
            self._state.final_status = status
        self._save()
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        with self._lock:
            self._abandoned = self._thread.is_alive()
        complete = not self._abandoned and self._is_drained()
        if not complete:
            logger.warning(
                "MLflow did not take everything in time; metrics.jsonl has all of it, and the next attempt of this run "
                "(or `python -m orchestration.tracking %s`) sends the rest",
                self._state_file.parent,
            )
        return complete

    def _run_forever(self) -> None:
        while not (self._refused or self._abandoned):
            pause = POLL_S
            try:
                self._deliver()
                self._failures = 0
                if self._closing and self._is_drained():
                    self._sink.finish(self._state.final_status or "KILLED")
                    return
            except SinkUnavailable as error:
                pause = self._after_failure(error)
            except SinkRefused as error:
                self._refused = True
                logger.error("MLflow refuses this run (%s); metrics.jsonl goes on without it", error)
            if self._closing and self._failures:
                return
            self._wake.wait(pause)

    def _after_failure(self, error: SinkUnavailable) -> float:
        self._failures += 1
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self._failures - 1))
        if time.monotonic() - self._warned_at >= WARN_EVERY_S:
            self._warned_at = time.monotonic()
            logger.warning("MLflow is not reachable (%s); metrics wait in metrics.jsonl, trying again", error)
        return pause

    def _deliver(self) -> None:
        if self._unsaved:
            self._save()
        if not self._started:
            self._state.run_id = self._sink.start(self._run)
            self._started = True
            self._save()
        while not self._abandoned and self._deliver_batch():
            pass
        while not self._abandoned and self._state.artifacts:
            self._deliver_artifact(*self._state.artifacts[0])

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
        self._save()
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
        self._save()

    def _is_drained(self) -> bool:
        size = self._metrics_file.stat().st_size if self._metrics_file.is_file() else 0
        return self._state.cursor >= size and not self._state.artifacts

    def _save(self) -> None:
        with self._lock:
            if self._abandoned:
                return
            try:
                self._state.save(self._state_file)
                self._unsaved = False
            except OSError as error:
                logger.error("%s: cannot be written: %s", self._state_file, redact_text(str(error)))


def _start_mirror(
    config: Config,
    state: MirrorState,
    run_dir: Path,
    tags: Mapping[str, str],
    datasets: Sequence[tuple[str, str, str]] = (),
) -> Mirror:
    uri, artifact_root = mlflow_store(config)
    destination = sha256(uri.encode()).hexdigest()[:16]
    if state.destination != destination:
        state.destination, state.run_id, state.cursor, state.delivered_step = destination, None, 0, 0
    tree = redact(config.model_dump(mode="json"))
    run = RunDescription(
        name=config.name,
        experiment=config.tracking.experiment,
        run_key=state.run_key,
        run_id=os.environ.get("MLFLOW_RUN_ID") or state.run_id,
        params=flatten(tree),
        tags={**provenance_tags(tree), "softgrpo.attempt": str(state.attempt), **redact(tags)},
        datasets=tuple(datasets),
    )
    mirror = Mirror(MlflowSink(uri, artifact_root), run, state, run_dir)
    mirror.start()
    return mirror


def mlflow_store(config: Config) -> tuple[str, Path | None]:
    """(tracking URI, artifact folder for a local store): the config's, the environment's, or sqlite beside the run."""
    uri = config.tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri, None
    outputs = config.run_dir.absolute().parent
    return f"sqlite:///{outputs / 'mlflow.db'}", outputs / "mlartifacts"


def send_rest(run_dir: Path, timeout_s: float) -> bool:
    """Send what an ended run could not deliver; False if it did not all go within `timeout_s`."""
    config = load_config(run_dir / "config.yaml")
    state = MirrorState.load(run_dir / "tracking.json")
    mirror = _start_mirror(config, state, run_dir.absolute(), {})
    return mirror.close(state.final_status or "KILLED", timeout_s)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    sys.exit(0 if all(send_rest(Path(directory), timeout_s=600.0) for directory in sys.argv[1:]) else 1)
