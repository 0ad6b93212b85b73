"""The warning before a collapse: only when KL and entropy rise together."""

from __future__ import annotations

import pytest

from learner.collapse_watch import CollapseWatch


def step(kl: float, entropy: float) -> dict[str, float]:
    return {
        "objective/kl_thinking": kl,
        "objective/kl_answer": kl,
        "objective/entropy_thinking": entropy,
        "objective/entropy_answer": entropy,
        "objective/positions_thinking": 30.0,
        "objective/positions_answer": 10.0,
    }


def warnings(kl: tuple[float, float], entropy: tuple[float, float], number: int = 60) -> list[str]:
    """Both move linearly between two values."""
    watch = CollapseWatch(window=30)
    shares = [i / (number - 1) for i in range(number)]
    found = [
        watch.observe(step(kl[0] + share * (kl[1] - kl[0]), entropy[0] + share * (entropy[1] - entropy[0])))
        for share in shares
    ]
    return [message for message in found if message]


def test_the_published_signature_warns_once_per_window() -> None:
    found = warnings((0.009, 0.040), (0.39, 0.60))
    assert 1 <= len(found) <= 2
    assert "rise together" in found[0]


@pytest.mark.parametrize(
    ("kl", "entropy"),
    [
        ((0.001, 0.03), (0.54, 0.39)),  # ordinary learning
        ((0.01, 0.01), (0.4, 0.6)),
        ((0.01, 0.03), (0.4, 0.4)),
        ((0.0, 0.0), (0.4, 0.8)),  # no reference policy
        ((-0.0010, -0.0011), (0.4, 0.8)),  # signed estimates: it falls
        ((-0.0010, -0.0001), (0.4, 0.8)),
    ],
)
def test_either_alone_does_not(kl: tuple[float, float], entropy: tuple[float, float]) -> None:
    assert warnings(kl, entropy) == []


def test_steps_without_positions_are_ignored() -> None:
    assert CollapseWatch(window=3).observe({}) is None
