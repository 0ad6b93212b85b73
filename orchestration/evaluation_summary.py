"""Statistics of an evaluation result and the comparison of two, as plain data and as text.

All intervals are 95 % bootstrap intervals over questions. Pass@k is the unbiased estimator for k up to n/4; the value
of the first k samples, which published tables often show, stands beside it. Differences are paired by question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from orchestration.evaluation_store import StoredSample
from orchestration.statistics import (
    LEVEL,
    Interval,
    PairedDifference,
    bootstrap_mean,
    first_k,
    majority_vote,
    paired_difference,
    pass_at_k,
    reported_ks,
)

Questions = Mapping[str, Sequence[StoredSample]]


@dataclass(frozen=True, slots=True)
class ArmStatistics:
    """One arm on one benchmark."""

    num_questions: int
    num_samples: int
    """Per question."""
    pass_at: dict[int, Interval]
    first: dict[int, float]
    majority: Interval
    """Over all samples."""
    mean_length: Interval
    """Response tokens."""
    truncated: float
    distinct_traces: float
    """Mean share of a question's samples that thought differently."""
    entropy: float | None
    top_weight: float | None
    active: float | None
    """Candidates in the mixture; 1 is discrete."""
    never_solved: float
    verdicts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values; keys of dictionaries become text."""
        return asdict(self)


def arm_statistics(questions: Questions) -> ArmStatistics:
    """Raises `ValueError` where there are no questions or their numbers of samples differ."""
    counts = {len(samples) for samples in questions.values()}
    if len(counts) != 1:
        raise ValueError(f"questions with {sorted(counts)} samples: the evaluation is not finished, run it again")
    (num_samples,) = counts
    samples = [sample for found in questions.values() for sample in found]
    soft = [sample for sample in samples if sample.entropy is not None]
    return ArmStatistics(
        num_questions=len(questions),
        num_samples=num_samples,
        pass_at={k: bootstrap_mean(list(per_question(questions, k).values())) for k in reported_ks(num_samples)},
        first={k: fmean(first_k(_correct(found), k) for found in questions.values()) for k in _powers(num_samples)},
        majority=bootstrap_mean(
            [majority_vote([s.extracted for s in found], _correct(found)) for found in questions.values()]
        ),
        mean_length=bootstrap_mean(list(mean_lengths(questions).values())),
        truncated=fmean(sample.truncated for sample in samples),
        distinct_traces=fmean(len({s.trace for s in found}) / len(found) for found in questions.values()),
        entropy=_position_mean(soft, lambda sample: sample.entropy),
        top_weight=_position_mean(soft, lambda sample: sample.top_weight),
        active=_position_mean(soft, lambda sample: sample.active),
        never_solved=fmean(not any(_correct(found)) for found in questions.values()),
        verdicts=dict(Counter(sample.verdict for sample in samples)),
    )


def per_question(questions: Questions, k: int) -> dict[str, float]:
    """Unbiased Pass@k of every question."""
    return {name: pass_at_k(len(found), sum(_correct(found)), k) for name, found in questions.items()}


def mean_lengths(questions: Questions) -> dict[str, float]:
    """Mean response length of every question."""
    return {name: fmean(sample.length for sample in found) for name, found in questions.items()}


@dataclass(frozen=True, slots=True)
class Comparison:
    """b - a on one benchmark."""

    benchmark: str
    a: str
    b: str
    pass_at: dict[int, PairedDifference]
    length: PairedDifference


def compare(benchmark: str, names: tuple[str, str], a: Questions, b: Questions) -> Comparison:
    """Paired differences of everything that both sides can estimate without bias."""
    shared_samples = min(len(found) for side in (a, b) for found in side.values())
    return Comparison(
        benchmark,
        *names,
        pass_at={k: paired_difference(per_question(a, k), per_question(b, k)) for k in reported_ks(shared_samples)},
        length=paired_difference(mean_lengths(a), mean_lengths(b)),
    )


def statistics_table(results: Mapping[tuple[str, str], ArmStatistics]) -> list[str]:
    """One line per benchmark and arm."""
    rows = [("benchmark", "arm", "questions x n", "Pass@1", "Pass@k", "first k", "majority", "length", "cut off")]
    for (benchmark, arm), found in results.items():
        largest = max(found.pass_at)
        rows.append(
            (
                benchmark,
                arm,
                f"{found.num_questions} x {found.num_samples}",
                _percent(found.pass_at[1]),
                f"@{largest} {_percent(found.pass_at[largest])}" if largest > 1 else "-",
                f"@{found.num_samples} {100 * found.first[max(found.first)]:.1f}",
                _percent(found.majority),
                f"{found.mean_length.mean:.1f}",
                f"{100 * found.truncated:.1f}",
            )
        )
    return _align(rows)


def comparison_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """Differences with intervals, and whether any of them is more than noise."""
    rows: list[tuple[str, ...]] = [("benchmark", "difference", "value", "points", f"{LEVEL:.0%} interval", "p", "")]
    tests = 0
    found = 0
    for comparison in comparisons:
        for k, difference in comparison.pass_at.items():
            tests += 1
            found += difference.significant
            rows.append(_difference_row(comparison, f"Pass@{k}", difference, 100.0))
        rows.append(_difference_row(comparison, "length", comparison.length, 1.0))
    lines = _align(rows)
    questions = max((c.length.num_questions for c in comparisons), default=0)
    if found == 0:
        lines.append(f"nothing is significant: no Pass@k differs by more than the noise of up to {questions} questions")
    else:
        chance = tests * (1 - LEVEL)
        lines.append(
            f"{found} of {tests} Pass@k differences are significant at {1 - LEVEL:.0%} each; {chance:.1f} would be by "
            "chance alone"
        )
    return lines


def _difference_row(comparison: Comparison, value: str, difference: PairedDifference, scale: float) -> tuple[str, ...]:
    interval = difference.interval
    return (
        comparison.benchmark,
        f"{comparison.b} - {comparison.a}",
        value,
        f"{scale * interval.mean:+.2f}",
        f"[{scale * interval.low:+.2f}, {scale * interval.high:+.2f}]",
        "<.001" if difference.p_value < 0.001 else f"{difference.p_value:.3f}",
        "significant" if difference.significant else "",
    )


def _correct(samples: Sequence[StoredSample]) -> list[bool]:
    return [sample.correct for sample in samples]


def _powers(num_samples: int) -> list[int]:
    return sorted({*(1 << power for power in range(num_samples.bit_length())), num_samples} - {0})


def _position_mean(samples: Sequence[StoredSample], value: Callable[[StoredSample], float | None]) -> float | None:
    """Mean over soft positions of a number that is stored as a mean per response."""
    total = sum(sample.soft_length for sample in samples)
    if not total:
        return None
    return sum((value(sample) or 0.0) * sample.soft_length for sample in samples) / total


def _percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
