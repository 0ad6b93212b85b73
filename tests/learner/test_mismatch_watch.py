"""The alarm on the gap between engine and learner: once per stretch, only where tokens and weights are of one age."""

from __future__ import annotations

import math

import pytest

from learner.mismatch_watch import TOLERANCE, UNJUDGED_THINKING, MismatchWatch

VERSION = 7


def step(thinking: float | None, answer: float | None = 0.0, oldest: int = VERSION) -> dict[str, float]:
    gaps = {"mismatch/kl_thinking": thinking, "mismatch/kl_answer": answer}
    return {"learner/oldest_version": float(oldest), **{name: gap for name, gap in gaps.items() if gap is not None}}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("part", ["thinking", "answer"])
def test_a_gap_above_the_tolerance_is_named(dtype: str, part: str) -> None:
    watch = MismatchWatch(dtype, "censored")
    assert watch.observe(step(TOLERANCE[dtype], TOLERANCE[dtype]), VERSION) is None
    assert watch.alarm is False
    large = 2 * TOLERANCE[dtype]
    warning = watch.observe(step(large) if part == "thinking" else step(None, large), VERSION)
    assert watch.alarm is True
    assert warning is not None and f"(mismatch/kl_{part} {large:.4g}; up to {TOLERANCE[dtype]:g} is" in warning


def test_every_stretch_is_warned_of_once() -> None:
    """Steps that cannot be judged do not end it."""
    watch = MismatchWatch("float32", "censored")
    seen = []
    for metrics in (step(1.0), step(math.nan), step(1.0, oldest=VERSION - 1), step(1.0), step(0.0), step(1.0)):
        seen.append((watch.observe(metrics, VERSION) is not None, watch.alarm))
    assert seen == [(True, True), (False, True), (False, None), (False, True), (False, False), (True, True)]


@pytest.mark.parametrize(
    ("metrics", "version"),
    [(step(1.0, oldest=VERSION - 1), VERSION), (step(1.0), None), (step(None, None), VERSION)],
    ids=["older tokens", "weights without a version", "no positions"],
)
def test_what_cannot_be_judged_is_not(metrics: dict[str, float], version: int | None) -> None:
    watch = MismatchWatch("float32", "censored")
    assert watch.observe(metrics, version) is None
    assert watch.alarm is None


@pytest.mark.parametrize("likelihood", UNJUDGED_THINKING)
def test_a_gap_that_belongs_to_the_likelihood_is_no_fault(likelihood: str) -> None:
    watch = MismatchWatch("bfloat16", likelihood)
    assert watch.observe(step(1.0), VERSION) is None and watch.alarm is False
    assert watch.observe(step(1.0, None), VERSION) is None and watch.alarm is None
    warning = watch.observe(step(1.0, 1.0), VERSION)
    assert watch.alarm is True and warning is not None and "thinking" not in warning
