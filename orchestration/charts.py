"""Line charts as inline SVG: no script, no network, readable in both colour schemes; every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from orchestration.plots import COLOURS

WIDTH, HEIGHT = 420, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
MAX_POINTS = 600
"""Longer series are thinned: more points than pixels help nobody."""


@dataclass(frozen=True, slots=True)
class Line:
    """One series; `low` and `high` draw a band around it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Axes:
    """The ranges of a chart; `log_x` spaces x by powers of two."""

    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool = False

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        x0, x1 = (math.log2(value) for value in self.x) if self.log_x else self.x
        value = math.log2(x) if self.log_x else x
        across = (value - x0) / ((x1 - x0) or 1.0)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_range: tuple[float | None, float | None] = (None, None),
    log_x: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A figure with a title, axes and legend; `marks` are labelled vertical lines. Empty text without any point."""
    lines = [_thin(line) for line in lines if len(line.x)]
    if not lines:
        return ""
    axes = _axes(lines, y_range, log_x)
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(lines))]
    body = [*_grid(axes), *(_mark(axes, x, label) for x, label in marks)]
    for line, colour in zip(lines, colours, strict=True):
        body += _draw(axes, line, colour)
    legend = ""
    if len(lines) > 1:
        entries = [
            f'<span><i style="background:{colour}"></i>{escape(line.label)}</span>'
            for line, colour in zip(lines, colours, strict=True)
        ]
        legend = f'<div class="legend">{"".join(entries)}</div>'
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
        f"{legend}</figure>"
    )


def _axes(lines: Sequence[Line], y_range: tuple[float | None, float | None], log_x: bool) -> Axes:
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for values in (line.y, line.low or (), line.high or ()) for y in values]
    low = min(ys) if y_range[0] is None else y_range[0]
    high = max(ys) if y_range[1] is None else y_range[1]
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    return Axes((min(xs), max(xs)), (low, high), log_x)


def _grid(axes: Axes) -> list[str]:
    parts = []
    for value in nice_ticks(*axes.y):
        _, y = axes.place(axes.x[0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{_number(value)}</text>')
    ticks = _powers(*axes.x) if axes.log_x else nice_ticks(*axes.x)
    for value in ticks:
        x, _ = axes.place(value, axes.y[0])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_number(value)}</text>')
    return parts


def _draw(axes: Axes, line: Line, colour: str) -> list[str]:
    parts = []
    if line.low is not None and line.high is not None:
        upper = [axes.place(x, y) for x, y in zip(line.x, line.high, strict=True)]
        lower = [axes.place(x, y) for x, y in zip(line.x, line.low, strict=True)]
        parts.append(f'<polygon points="{_points([*upper, *lower[::-1]])}" fill="{colour}" opacity="0.15"/>')
    placed = [axes.place(x, y) for x, y in zip(line.x, line.y, strict=True)]
    if len(placed) <= 12:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}"/>' for x, y in placed]
    parts.append(f'<polyline points="{_points(placed)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return parts


def _mark(axes: Axes, x: float, label: str) -> str:
    across, _ = axes.place(x, axes.y[0])
    return (
        f'<line class="mark" x1="{across:.1f}" y1="{TOP}" x2="{across:.1f}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{across + 3:.1f}" y="{TOP + 9}">{escape(label)}</text>'
    )


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round values inside a range, about `wanted` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    return [2.0**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]


def _thin(line: Line) -> Line:
    step = -(-len(line.x) // MAX_POINTS)
    if step <= 1:
        return line
    low = None if line.low is None else line.low[::step]
    high = None if line.high is None else line.high[::step]
    return Line(line.label, line.x[::step], line.y[::step], low, high)


def _points(placed: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)


def _number(value: float) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"
