"""The only file that talks to MLflow; all of it may block, fail or hang, and only the mirror's thread calls it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from orchestration.metrics_log import RESERVED
from orchestration.redaction import redact_text

RUN_KEY_TAG = "softgrpo.run_key"
MAX_PARAMS = 100
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 5000
MAX_BATCH = 1000
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""The default timeouts block one call for minutes; values that the user exported win."""
NAME_CHARACTERS = re.compile(r"[^\w\-. :/]")


class SinkUnavailable(Exception):
    """The server did not answer properly; the same call may succeed later."""


class SinkRefused(Exception):
    """The server knows us and says no (authentication, permission): trying again would not help."""


class SinkRejected(Exception):
    """The server refuses this particular content; the rest may go on."""


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What a run is in MLflow."""

    name: str
    experiment: str
    run_key: str
    """Identifies the logical run over all its attempts."""
    run_id: str | None
    """The MLflow run, once known."""
    params: dict[str, str]
    tags: dict[str, str]
    datasets: tuple[tuple[str, str, str], ...] = ()
    """(name, digest, path) of each dataset."""


class MlflowSink:
    """One MLflow run, created or reopened by `start`."""

    def __init__(self, uri: str, artifact_root: Path | None) -> None:
        """`artifact_root` is where a new experiment keeps its files; None leaves that to the server."""
        self.uri = uri
        self._artifact_root = artifact_root
        self._client: Any = None
        self._run_id = ""

    def start(self, run: RunDescription) -> str:
        """Create the run, or reopen the one of an earlier attempt; returns its id."""
        with _translated_errors():
            self._client = self._client or self._connect()
            self._run_id = self._find_run(run) or self._create_run(run)
            self._client.update_run(self._run_id, status="RUNNING")
            for key, value in run.tags.items():
                self._client.set_tag(self._run_id, key, value[:MAX_TAG_CHARACTERS])
            self._log_absent_params(run.params)
            self._log_datasets(run.datasets)
            return self._run_id

    def log_records(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Send lines of the metrics log."""
        from mlflow.entities import Metric

        metrics = [
            Metric(sanitise(name), value, int(record["time"] * 1000), int(record["step"]))
            for record in records
            for name, value in record.items()
            if name not in RESERVED and value is not None
        ]
        with _translated_errors():
            for start in range(0, len(metrics), MAX_BATCH):
                self._client.log_batch(self._run_id, metrics=metrics[start : start + MAX_BATCH], synchronous=True)

    def log_artifact(self, path: Path, folder: str) -> None:
        """Upload one file."""
        with _translated_errors():
            self._client.log_artifact(self._run_id, str(path), folder or None)

    def register_model(self, name: str, directory: Path) -> None:
        """Add a version of a registered model that points at an exported checkpoint; once per directory."""
        with _translated_errors():
            source = directory.as_uri()
            if any(version.source == source for version in self._versions(name)):
                return
            self._client.create_model_version(name, source=source, run_id=self._run_id)

    def _versions(self, name: str) -> Sequence[Any]:
        found = self._client.search_model_versions(f"name = '{name}'")
        if not found and not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        return list(found)

    def finish(self, status: str) -> None:
        """Set the final state (FINISHED, KILLED or FAILED)."""
        with _translated_errors():
            self._client.set_terminated(self._run_id, status)

    def _connect(self) -> Any:
        for key, value in CLIENT_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def _experiment_id(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None
        if self._artifact_root is not None:
            location = (self._artifact_root / re.sub(r"[^A-Za-z0-9._-]", "_", name)).absolute().as_uri()
        return str(self._client.create_experiment(name, artifact_location=location))

    def _find_run(self, run: RunDescription) -> str | None:
        if run.run_id:
            return run.run_id
        experiment = self._experiment_id(run.experiment)
        found = self._client.search_runs([experiment], f"tags.`{RUN_KEY_TAG}` = '{run.run_key}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _create_run(self, run: RunDescription) -> str:
        experiment = self._experiment_id(run.experiment)
        created = self._client.create_run(experiment, run_name=run.name, tags={RUN_KEY_TAG: run.run_key})
        return str(created.info.run_id)

    def _log_absent_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        present = self._client.get_run(self._run_id).data.params
        absent = [Param(sanitise(key), value) for key, value in params.items() if sanitise(key) not in present]
        for start in range(0, len(absent), MAX_PARAMS):
            self._client.log_batch(self._run_id, params=absent[start : start + MAX_PARAMS], synchronous=True)

    def _log_datasets(self, datasets: Iterable[tuple[str, str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput

        inputs = [
            DatasetInput(Dataset(name=name, digest=digest, source_type="local", source=json.dumps({"uri": path})))
            for name, digest, path in datasets
        ]
        if inputs:
            self._client.log_inputs(self._run_id, inputs)


def sanitise(name: str) -> str:
    """A metric or parameter name that MLflow accepts: `pass@1` becomes `pass_at_1`."""
    return NAME_CHARACTERS.sub("_", name.replace("@", "_at_"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and short texts: lists as JSON, over-long values cut with a digest behind them."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        if len(text) > MAX_PARAM_CHARACTERS:
            digest = sha256(text.encode()).hexdigest()[:16]
            text = f"{text[: MAX_PARAM_CHARACTERS - 20]}...{digest}"
        flat[f"{prefix}{key}"] = text
    return flat


class _translated_errors:
    """Whatever MLflow, its HTTP client or its database raise becomes one of the three errors above."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        text = redact_text(f"{type(error).__name__}: {str(error)[:300]}")
        status = _http_status(error)
        if status in (401, 403):
            raise SinkRefused(text) from None
        if status == 400:
            raise SinkRejected(text) from None
        raise SinkUnavailable(text) from None


def _http_status(error: Exception) -> int | None:
    match = re.search(r"error code[: ]+(\d{3})", str(error))
    if match:
        return int(match.group(1))
    status = getattr(error, "get_http_status_code", None)
    return int(status()) if status else None
