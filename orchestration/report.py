"""`softgrpo report`: one self-contained HTML page about a run and its evaluations, PNG curves, and MLflow artifacts.

metrics.jsonl, summary.json, config.yaml, trajectories/*.parquet   of a run
results.json, <benchmark>/<arm>/part-*.parquet                     of its evaluation, and of others with --evaluation
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.collapse import collapse_alarm
from orchestration.config import Config, ConfigError, load_config
from orchestration.evaluation_results import RESULTS, summarise
from orchestration.evaluation_store import ResultDirectory
from orchestration.metrics_log import read_metrics
from orchestration.plots import plot_curves
from orchestration.report_page import (
    browser_section,
    config_section,
    curves_section,
    pass_at_k_section,
    published_section,
    render,
    summary_section,
)
from orchestration.report_traces import TraceSource, read_traces, token_texts

logger = logging.getLogger(__name__)

DEFAULT_TRACES = 60
REPORT = "report.html"


@dataclass(frozen=True, slots=True)
class Material:
    """Everything that a report is made from."""

    run_dir: Path
    config: Config
    config_text: str
    records: list[dict[str, Any]]
    summary: dict[str, Any] | None
    results: list[dict[str, Any]]
    sources: list[TraceSource]


def main(arguments: Sequence[str]) -> int:
    """The command; returns an exit code."""
    namespace = _parser().parse_args(list(arguments))
    material = gather(namespace.run, namespace.evaluation)
    output = namespace.output or namespace.run / REPORT
    page = make_page(material, namespace.traces)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror}); give another --output") from None
    written = [output]
    if material.records:
        picture = namespace.run / "plots" / "curves.png"
        plot_curves({material.config.name: material.records}, picture)
        written.append(picture)
    if namespace.mlflow:
        upload(namespace.run, written)
    print("\n".join(map(str, written)))
    return 0


def gather(run_dir: Path, evaluations: Sequence[Path]) -> Material:
    """Read a run; its own `evaluation/` is included where there is one. Raises `ConfigError` if it is no run."""
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise ConfigError(f"{run_dir}: not a run directory (no config.yaml); give the directory of a training run")
    own = run_dir / "evaluation"
    named = [*([own] if (own / "settings.json").is_file() else []), *evaluations]
    directories = list(dict.fromkeys(directory.resolve() for directory in named))
    results: list[dict[str, Any]] = []
    sources = [
        TraceSource(f"step {int(path.stem.removeprefix('step_'))}", path)
        for path in sorted((run_dir / "trajectories").glob("step_*.parquet"))
    ]
    for directory in directories:
        result = ResultDirectory(directory)
        summarise(result)
        found = json.loads((directory / RESULTS).read_text(encoding="utf-8"))["results"]
        prefix = f"{directory.parent.name}: " if len(directories) > 1 else ""
        results += [{**entry, "arm": f"{prefix}{entry['arm']}"} for entry in found]
        for entry in found:
            parts = result.parts(entry["benchmark"], entry["arm"])
            sources += [TraceSource(f"{prefix}{entry['benchmark']}, {entry['arm']}", path) for path in parts[:1]]
    summary_file = run_dir / "summary.json"
    return Material(
        run_dir=run_dir,
        config=load_config(config_file),
        config_text=config_file.read_text(encoding="utf-8"),
        records=read_metrics(run_dir / "metrics.jsonl"),
        summary=json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else None,
        results=results,
        sources=sources,
    )


def make_page(material: Material, num_traces: int) -> str:
    """The HTML of a report."""
    config = material.config
    trained = material.run_dir / "model"
    texts = token_texts(trained if trained.is_dir() else Path(config.model.path))
    traces = read_traces(material.sources, texts, num_traces)
    thinking = f"{config.sampling.thinking} thinking"
    if config.sampling.thinking == "soft":
        thinking += f", likelihood {config.algorithm.likelihood}"
    steps = sum(1 for record in material.records if record.get("reward/mean") is not None)
    return render(
        title=f"{config.name}",
        subtitle=f"{config.model.path}; {thinking}; {steps} steps; seed {config.seed}",
        sections=[
            summary_section(material.summary),
            curves_section(material.records, collapse_alarm(material.records)),
            pass_at_k_section(material.results),
            published_section(material.results, config.model.path),
            browser_section(traces),
            config_section(material.config_text),
        ],
        traces=traces,
    )


def upload(run_dir: Path, files: Sequence[Path]) -> None:
    """Add files to the run's entry in MLflow; raises `ConfigError` where the run has none."""
    from mlflow import MlflowClient

    from orchestration.tracking import mlflow_store

    state = run_dir / "tracking.json"
    run_id = json.loads(state.read_text(encoding="utf-8")).get("run_id") if state.is_file() else None
    if run_id is None:
        raise ConfigError(f"{run_dir}: this run has no entry in MLflow; leave --mlflow out")
    uri, _ = mlflow_store(load_config(run_dir / "config.yaml"))
    client = MlflowClient(tracking_uri=uri)
    for path in files:
        client.log_artifact(run_id, str(path), "report")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="softgrpo report", description="Write one HTML page about a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, as in outputs/demo")
    parser.add_argument(
        "--evaluation", type=Path, action="append", default=[], metavar="DIR", help="a result of `softgrpo evaluate`"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: {REPORT} in the run directory")
    parser.add_argument("--traces", type=int, default=DEFAULT_TRACES, help=f"trajectories to show ({DEFAULT_TRACES})")
    parser.add_argument("--mlflow", action="store_true", help="add the page and the picture to the run in MLflow")
    return parser
