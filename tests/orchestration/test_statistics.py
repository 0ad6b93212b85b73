"""Pass@k against brute-force enumeration; votes, intervals and paired tests on cases with known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from orchestration.statistics import (
    bootstrap_mean,
    first_k,
    majority_vote,
    paired_difference,
    pass_at_k,
    reported_ks,
)


def test_pass_at_k_equals_enumeration() -> None:
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_nonsense(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased_where_first_k_of_one_order_is_not_averaged() -> None:
    correct = [False, False, True, False]
    assert first_k(correct, 2) == 0.0
    assert first_k(correct, 3) == 1.0
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)


def test_reported_ks_keep_four_disjoint_chunks() -> None:
    assert reported_ks(1) == [1]
    assert reported_ks(16) == [1, 2, 4]
    assert reported_ks(128) == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["3", "3", "4"], [True, True, False], 1.0),
        (["3", "4", " 4 "], [True, False, False], 0.0),
        (["1/2", "0.5", "7", "7", "7"], [True, True, False, False, False], 0.0),
        (["1/2", "0.5", "7"], [True, True, False], 1.0),
        (["3", "4"], [True, False], 0.5),
        ([None, None, "4"], [False, False, False], 0.0),
        ([None, None, "3"], [False, False, True], 1.0),
        ([None], [False], 0.0),
    ],
)
def test_majority_vote(answers: list[str | None], correct: list[bool], expected: float) -> None:
    assert majority_vote(answers, correct) == expected


def test_bootstrap_interval_has_the_width_of_the_normal_theory() -> None:
    values = (np.arange(400) % 2).astype(float).tolist()
    interval = bootstrap_mean(values)
    assert interval.mean == 0.5
    half_width = 1.96 * 0.5 / np.sqrt(400)
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.1)
    assert bootstrap_mean(values) == interval, "same seed, same interval"
    with pytest.raises(ValueError, match="no questions"):
        bootstrap_mean([])


def test_bootstrap_covers_the_true_mean_at_about_its_level() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap_mean(rng.binomial(1, 0.3, 60).tolist(), seed=trial, resamples=500)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_paired_difference_sees_what_unpaired_intervals_hide() -> None:
    rng = np.random.default_rng(1)
    difficulty = rng.random(100)
    a = {f"q{i}": float(value) for i, value in enumerate(difficulty)}
    b = {question: value + 0.02 + 0.01 * rng.standard_normal() for question, value in a.items()}
    difference = paired_difference(a, b)
    assert difference.significant
    assert difference.interval.mean == pytest.approx(0.02, abs=0.005)
    unpaired_a, unpaired_b = bootstrap_mean(list(a.values())), bootstrap_mean(list(b.values()))
    assert unpaired_a.high > unpaired_b.low


def test_paired_difference_of_equal_arms_is_not_significant() -> None:
    same = {f"q{i}": float(i % 2) for i in range(20)}
    difference = paired_difference(same, same)
    assert difference.p_value == 1.0
    assert not difference.significant


def test_paired_difference_uses_shared_questions_only() -> None:
    difference = paired_difference({"x": 0.0, "y": 1.0, "only a": 0.0}, {"x": 1.0, "y": 1.0, "only b": 1.0})
    assert difference.num_questions == 2
    assert difference.interval.mean == 0.5
    with pytest.raises(ValueError, match="share no question"):
        paired_difference({"x": 1.0}, {"y": 1.0})


def test_false_positive_rate_of_the_paired_test_is_its_level() -> None:
    rng = np.random.default_rng(2)
    found = 0
    for trial in range(200):
        a = {f"q{i}": value for i, value in enumerate(rng.standard_normal(30))}
        b = {question: value + rng.standard_normal() for question, value in a.items()}
        found += paired_difference(a, b, seed=trial, resamples=500).significant
    assert found / 200 <= 0.1
