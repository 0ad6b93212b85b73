"""Statistics of sampled answers: Pass@k, first-k, majority vote, bootstrap intervals, paired differences (pure).

The unit of resampling is the question: samples of one question are not independent evidence. Values are fractions.
Source of the unbiased estimator: Chen et al. 2021 (arXiv 2107.03374), section 2.1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
MAX_CHUNK_VALUES = 2_000_000


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"Pass@{k} needs 1 <= k <= n, and there are n={num_samples} samples")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} correct of {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def first_k(correct: Sequence[bool], k: int) -> float:
    """1 if one of the first k samples is correct: the value that published tables often call Pass@k."""
    if not 1 <= k <= len(correct):
        raise ValueError(f"the first {k} of {len(correct)} samples")
    return float(any(correct[:k]))


def reported_ks(num_samples: int) -> list[int]:
    """Powers of two for which the unbiased estimator still averages: k up to n/4, and always 1."""
    return [1 << power for power in range(num_samples.bit_length()) if 1 << power <= max(1, num_samples // 4)]


def majority_vote(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Accuracy of the most frequent answer; ties share the credit, samples without an answer do not vote.

    Answers are equal where their texts are equal up to spaces, or where both are correct. 0 without any vote.
    """
    votes: dict[Hashable, int] = defaultdict(int)
    for answer, right in zip(answers, correct, strict=True):
        if right:
            votes[True] += 1
        elif answer is not None:
            votes["".join(answer.split())] += 1
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return (True in winners) / len(winners)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over questions with its percentile-bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of b - a over the questions that both answered."""

    interval: Interval
    p_value: float
    """Two-sided sign-flip test: how often random signs give a mean at least as far from 0."""
    num_questions: int

    @property
    def significant(self) -> bool:
        """The interval excludes 0 and the test agrees, at the level of the module."""
        excluded = self.interval.low > 0 or self.interval.high < 0
        return excluded and self.p_value < 1 - LEVEL


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean and 95 % interval over questions; `values` are one number per question."""
    if not values:
        raise ValueError("an interval of no questions")
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = _in_chunks(resamples, len(data), lambda n: data[rng.integers(0, len(data), (n, len(data)))].mean(axis=1))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(data.mean()), float(low), float(high))


def paired_difference(
    a: Mapping[str, float], b: Mapping[str, float], *, seed: int = 0, resamples: int = RESAMPLES
) -> PairedDifference:
    """Compare two arms question by question (b - a); questions of only one arm do not count.

    Raises `ValueError` if they share no question.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        raise ValueError("the two results share no question; compare runs over the same benchmark")
    differences = np.array([b[question] - a[question] for question in shared])
    interval = bootstrap_mean(differences.tolist(), seed=seed, resamples=resamples)
    rng = np.random.default_rng([seed, 1])
    flipped = _in_chunks(
        resamples, len(shared), lambda n: (rng.choice([-1.0, 1.0], (n, len(shared))) * differences).mean(axis=1)
    )
    extreme = int((np.abs(flipped) >= abs(interval.mean) - 1e-12).sum())
    return PairedDifference(interval, (extreme + 1) / (resamples + 1), len(shared))


def _in_chunks(resamples: int, width: int, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """`resamples` statistics in pieces that fit into memory: a full GSM8K matrix would take 100 MB."""
    size = max(1, MAX_CHUNK_VALUES // width)
    sizes = [min(size, resamples - start) for start in range(0, resamples, size)]
    return np.concatenate([draw(n) for n in sizes])
