"""The run's metrics for Prometheus, through Ray's own exporter: every node serves them, one Grafana dashboard shows it.

`reward/mean` becomes the gauge `ray_softgrpo_reward_mean{Run="name"}`. The only tag is the run: steps, versions and
actor ids would make a new series each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

PREFIX = "softgrpo_"
RAY_PREFIX = "ray_"
"""Ray puts it before every name that it serves."""


def prometheus_name(metric: str) -> str:
    """`kl/pass@1` -> `softgrpo_kl_pass_at_1`; Ray adds `ray_` when it serves it."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", metric.replace("@", "_at_"))


class MetricsExporter:
    """Sets gauges of this process's node; a value that is not finite is left out, like a metric that was not logged."""

    def __init__(self, run_name: str) -> None:
        self._tags = {"Run": run_name}
        self._gauges: dict[str, Gauge] = {}

    def export(self, metrics: Mapping[str, float]) -> None:
        """Show these values until the next call."""
        for metric, value in metrics.items():
            if math.isfinite(value):
                self._gauge(metric).set(float(value), tags=self._tags)

    def _gauge(self, metric: str) -> Gauge:
        if metric not in self._gauges:
            from ray.util.metrics import Gauge

            self._gauges[metric] = Gauge(prometheus_name(metric), description=metric, tag_keys=("Run",))
        return self._gauges[metric]
