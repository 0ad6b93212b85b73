"""Telemetry of a run: `metrics.jsonl` is the truth, MLflow a mirror that may be down, slow or restarted.

    controller --log()--> metrics.jsonl --mirror thread, cursor in tracking.json--> MLflow

Invariants: `log` never waits for a disk or a network; nothing that MLflow does reaches the caller; one logical run is
one MLflow run over all its attempts; secrets are hidden before anything leaves.

`python -m orchestration.tracking RUN_DIR` sends what an ended run could not deliver.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from orchestration.config import Config, load_config
from orchestration.metrics_log import MetricsLog
from orchestration.mirror import METRICS, FinalStatus, Mirror, MirrorState
from orchestration.mlflow_sink import MlflowSink, RunDescription, flatten
from orchestration.provenance import provenance_tags
from orchestration.redaction import redact, redact_text

CLOSE_S = 5.0
SEND_REST_S = 600.0
logger = logging.getLogger(__name__)


class Tracker:
    """What the controller logs to; `open` once per attempt, `close` once."""

    def __init__(self, log: MetricsLog, mirror: Mirror | None, registered_model: str | None) -> None:
        self.attempt = log.attempt
        """Number of this attempt at the run, from 1."""
        self._log = log
        self._mirror = mirror
        self._registered_model = registered_model
        self._last_step = 0

    @classmethod
    def open(
        cls,
        config: Config,
        *,
        tags: Mapping[str, str] | None = None,
        datasets: Sequence[tuple[str, str, str]] = (),
        checkpoint: Path | None = None,
    ) -> Tracker:
        """Start logging into the run directory of `config`, and mirroring unless `tracking.mlflow` is false.

        `datasets` are (name, digest, path); the `checkpoint` that the run goes on from replaces a lost `tracking.json`.
        """
        run_dir = config.run_dir.absolute()
        run_dir.mkdir(parents=True, exist_ok=True)
        state = MirrorState.load(run_dir, checkpoint)
        state.attempt += 1
        state.final_status = None
        state.save(run_dir)
        log = MetricsLog(run_dir / METRICS, attempt=state.attempt)
        if not config.tracking.mlflow:
            return cls(log, None, None)
        tracker = cls(
            log, _start_mirror(config, state, run_dir, tags or {}, datasets), config.tracking.registered_model
        )
        tracker._upload_config(run_dir / "config.yaml")
        return tracker

    def _upload_config(self, file: Path) -> None:
        if not file.is_file():
            return
        text = file.read_text(encoding="utf-8")
        if redact_text(text) == text:
            self.artifact(file, "config")
        else:
            logger.warning("%s holds a secret and is not uploaded", file)

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

    def register_model(self, directory: Path) -> None:
        """Have an exported model registered as `tracking.registered_model`, if that is set; returns at once."""
        if self._mirror is not None and self._registered_model is not None:
            self._mirror.set_model(self._registered_model, directory.absolute())

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run, once the server has answered."""
        return self._mirror.run_id if self._mirror else None

    @property
    def delivered_step(self) -> int:
        """The newest step that MLflow has."""
        return self._mirror.delivered_step if self._mirror else 0

    def flush(self) -> None:
        """Have all metrics on disk, and what MLflow has of them (a checkpoint calls this); a warning where not."""
        if not self._log.flush():
            logger.warning("%s: the disk does not take the metrics in time for this checkpoint", self._log.path)
        if self._mirror is not None:
            self._mirror.save()

    def close(self, status: FinalStatus) -> None:
        """Write everything, give the mirror at most five seconds, and stop."""
        self._log.close()
        if self._mirror is not None:
            self._mirror.close(status, CLOSE_S)


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
    state = MirrorState.load(run_dir)
    mirror = _start_mirror(config, state, run_dir.absolute(), {})
    return mirror.close(state.final_status or "KILLED", timeout_s)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    sys.exit(0 if all(send_rest(Path(directory), SEND_REST_S) for directory in sys.argv[1:]) else 1)
