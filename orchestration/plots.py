"""Pictures of a run: reward, length, entropy and staleness over training steps, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Records = Sequence[Mapping[str, Any]]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Distinguishable with every kind of colour blindness (Okabe and Ito)."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: `metric` over steps, with `upper` as a thin line where there is one."""

    title: str
    metric: str
    upper: str | None = None
    lowest: float | None = 0.0
    highest: float | None = None


PANELS = (
    Panel("reward (mean of the step's responses)", "reward/mean", highest=1.03),
    Panel("response length (tokens)", "rollout/length_mean"),
    Panel("entropy of the thinking tokens (nats)", "rollout/entropy"),
    Panel("staleness (versions; thin: oldest)", "staleness/mean", upper="staleness/max"),
)


def plot_curves(runs: Mapping[str, Records], path: Path, panels: Sequence[Panel] = PANELS) -> None:
    """Draw the panels for one or more runs (name -> records of `metrics.jsonl`) into one PNG."""
    from matplotlib.figure import Figure

    columns = 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for panel, axes in zip(panels, grid.flat, strict=False):
        for colour, (name, records) in zip(_colours(len(runs)), runs.items(), strict=True):
            steps, values = series(records, panel.metric)
            axes.plot(steps, values, color=colour, label=name, linewidth=1.6, marker="." if len(steps) < 3 else None)
            if panel.upper:
                axes.plot(*series(records, panel.upper), color=colour, linewidth=0.6, alpha=0.7)
        axes.set_title(panel.title, fontsize=10)
        axes.set_ylim(bottom=panel.lowest, top=panel.highest)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    if len(runs) > 1:
        grid[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def series(records: Records, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was logged and finite."""
    points = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _colours(number: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(number)]
