"""From stored answers to tables: `results.json` of one result, and the comparison of two."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from orchestration.config import ConfigError
from orchestration.evaluation_store import ResultDirectory
from orchestration.evaluation_summary import (
    ArmStatistics,
    Comparison,
    Questions,
    arm_statistics,
    compare,
    comparison_lines,
    statistics_table,
)
from orchestration.run_state import write_atomically

logger = logging.getLogger(__name__)

RESULTS = "results.json"

ResultArm = tuple[ResultDirectory, str | None]
"""A result, and the arm of it that is meant; None means all."""


def summarise(result: ResultDirectory) -> list[str]:
    """Write `results.json` from the stored rows and return the tables; an unfinished arm is in neither."""
    settings = result.settings()
    samples = {
        (benchmark, arm): result.samples(benchmark, arm)
        for benchmark in settings["benchmarks"]
        for arm in settings["arms"]
        if result.parts(benchmark, arm)
    }
    samples = {
        pair: questions for pair, questions in samples.items() if _is_finished(result, settings, pair, questions)
    }
    statistics = {pair: arm_statistics(questions) for pair, questions in samples.items()}
    comparisons = [
        compare(benchmark, (a, b), samples[benchmark, a], samples[benchmark, b])
        for benchmark in settings["benchmarks"]
        for a, b in combinations([arm for arm in settings["arms"] if (benchmark, arm) in samples], 2)
    ]
    record = {
        "settings": settings,
        "results": [
            {"benchmark": benchmark, "arm": arm, **found.to_json()} for (benchmark, arm), found in statistics.items()
        ],
    }
    write_atomically(result.path / RESULTS, json.dumps(record, indent=2).encode())
    lines = [f"{result.path}", "", *statistics_table(statistics)]
    if comparisons:
        lines += ["", *comparison_lines(comparisons)]
    return [*lines, *_best_temperatures(statistics)]


def compare_results(a: ResultArm, b: ResultArm) -> list[str]:
    """Paired differences of two results (b - a), arm by arm or between two named arms.

    Raises `ConfigError` if they asked different questions or share nothing.
    """
    first, second = a[0].settings(), b[0].settings()
    lines = [f"a: {a[0].path}", f"b: {b[0].path}"]
    for key in sorted(first["shared"].keys() | second["shared"].keys()):
        values = first["shared"].get(key), second["shared"].get(key)
        if values[0] != values[1]:
            lines.append(f"note: {key} differs: {values[0]!r} and {values[1]!r}")
    comparisons: list[Comparison] = []
    for benchmark in first["benchmarks"].keys() & second["benchmarks"].keys():
        if first["benchmarks"][benchmark] != second["benchmarks"][benchmark]:
            raise ConfigError(f"{benchmark}: the two results asked different questions or graded by different rules")
        for left_arm, right_arm in _arm_pairs(first["arms"], second["arms"], a[1], b[1]):
            left, right = a[0].samples(benchmark, left_arm), b[0].samples(benchmark, right_arm)
            if not left.keys() & right.keys():
                continue
            if difference := _decoding_difference(first["arms"][left_arm], second["arms"][right_arm]):
                lines.append(f"note: decoding is not matched: {difference}")
            comparisons.append(compare(benchmark, (f"a:{left_arm}", f"b:{right_arm}"), left, right))
    if not comparisons:
        raise ConfigError(f"{a[0].path} and {b[0].path} share no benchmark and arm with answers")
    return [*dict.fromkeys(lines), "", *comparison_lines(comparisons)]


def _is_finished(
    result: ResultDirectory, settings: Mapping[str, Any], pair: tuple[str, str], questions: Questions
) -> bool:
    """Whether every sample of every question is there; statistics of some would pass for those of all."""
    wanted, samples = settings["benchmarks"][pair[0]]["questions"], settings["shared"]["samples"]
    done = sum(len(found) == samples for found in questions.values())
    if done < wanted:
        logger.warning(
            "%s: %s, %s is left out: %d of %d questions are answered; the same `softgrpo evaluate` command goes on",
            *(result.path, *pair, done, wanted),
        )
    return done == wanted


def _best_temperatures(statistics: Mapping[tuple[str, str], ArmStatistics]) -> list[str]:
    """Where a sweep was run: the temperature of each arm with the best mean Pass@1."""
    scores: dict[str, dict[str, float]] = {}
    for (_, arm), found in statistics.items():
        name, at, temperature = arm.partition("@")
        if at:
            by_temperature = scores.setdefault(name, {})
            by_temperature[temperature] = by_temperature.get(temperature, 0.0) + found.pass_at[1].mean
    lines = [
        f"{name}: best temperature {max(found, key=lambda t: found[t])} (chosen on these same questions: it flatters)"
        for name, found in scores.items()
    ]
    return ["", *lines] if lines else []


def _arm_pairs(
    first: Mapping[str, Any], second: Mapping[str, Any], a: str | None, b: str | None
) -> list[tuple[str, str]]:
    for name, arms in ((a, first), (b, second)):
        if name is not None and name not in arms:
            raise ConfigError(f"no arm {name!r} in that result; it has {', '.join(arms)}")
    if a is None and b is None:
        return [(name, name) for name in first if name in second]
    return [(a or b or "", b or a or "")]


def _decoding_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Settings of decoding, other than the arm's own nature, in which two arms differ."""
    arm_defining = {"thinking", "gumbel_temperature", "noise_scale"}
    keys = sorted((first.keys() & second.keys()) - arm_defining)
    return ", ".join(f"{key} {first[key]!r} and {second[key]!r}" for key in keys if first[key] != second[key])
