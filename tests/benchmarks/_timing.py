"""Interleaved timing: the competitors take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Action = Callable[[], object]


def interleaved(
    actions: Mapping[str, Action], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of `clock` for every action in each of `rounds` rounds, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for round_number in range(rounds + 1):
        for name, action in actions.items():
            start = clock()
            action()
            if round_number:
                seconds[name].append(clock() - start)
    return seconds


def median(values: list[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def best_ratio(over: list[float], under: list[float]) -> float:
    """Ratio of the best rounds: for short actions, whose other rounds show what the neighbours were doing."""
    return min(over) / min(under)


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the per-round ratios: what a round slowed by a neighbour cannot move far."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
