"""Gauges: their names, what is left out, and that Prometheus really gets them from a node."""

from __future__ import annotations

import math
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from orchestration import metrics_export
from orchestration.metrics_export import MetricsExporter, prometheus_name
from tests.orchestration.ray_head import Head

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("reward/mean", "softgrpo_reward_mean"),
        ("evaluation/held-out/pass@1", "softgrpo_evaluation_held_out_pass_at_1"),
        ("groups/dropped/learner_lost", "softgrpo_groups_dropped_learner_lost"),
    ],
)
def test_names_are_legal_for_prometheus(metric: str, expected: str) -> None:
    assert prometheus_name(metric) == expected


def test_values_that_are_not_finite_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    set_values: list[tuple[str, float, dict[str, str]]] = []

    class Recorder:
        def __init__(self, name: str, **_: Any) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            set_values.append((self.name, value, tags))

    import ray.util.metrics

    monkeypatch.setattr(ray.util.metrics, "Gauge", Recorder)
    exporter = MetricsExporter("demo")
    exporter.export({"reward/mean": 0.5, "learner/grad_norm": math.nan, "objective/ratio_max": math.inf})
    exporter.export({"reward/mean": 1})
    assert set_values == [
        ("softgrpo_reward_mean", 0.5, {"Run": "demo"}),
        ("softgrpo_reward_mean", 1.0, {"Run": "demo"}),
    ]


DRIVER = """
import ray, time
from orchestration.metrics_export import MetricsExporter
ray.init()
exporter = MetricsExporter("demo")
for _ in range(120):
    exporter.export({"reward/mean": 0.25})
    time.sleep(0.5)
"""


@pytest.mark.slow
def test_a_node_serves_the_gauges(job_head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestration.submit import connect

    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", job_head.address)
    client = connect(job_head.address)
    job = client.submit_job(
        entrypoint=f"{sys.executable} -c '{DRIVER}'",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}},
    )
    wanted = f"{metrics_export.RAY_PREFIX}softgrpo_reward_mean"
    deadline = time.monotonic() + 90
    try:
        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{job_head.metrics_port}/metrics", timeout=10) as page:
                lines = [line for line in page.read().decode().splitlines() if line.startswith(wanted)]
            if lines:
                break
            assert time.monotonic() < deadline, client.get_job_logs(job)
            time.sleep(1)
    finally:
        client.stop_job(job)
    assert 'Run="demo"' in lines[0]
    assert lines[0].endswith(" 0.25")
