"""The alarm for a policy that is about to collapse: entropy and KL to the reference rise together, then reward falls.

In the released training curves every failed run showed this before its validation score fell; runs that stayed healthy
have falling or flat entropy while the KL grows. Trailing means over a window keep single noisy steps from raising it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ENTROPY = "rollout/entropy"
KL = "objective/kl_thinking"
REWARD = "reward/mean"

MIN_STEPS = 30
WINDOWS_PER_RUN = 20
MIN_WINDOW = 5
ENTROPY_RISE = 1.15
"""Over its lowest trailing mean so far, ..."""
ENTROPY_RISE_NATS = 0.02
"""... and by at least this."""
KL_RISE = 1.5
"""Over its trailing mean where entropy was lowest."""
REWARD_FALL = 0.05
"""Below its highest trailing mean: the collapse itself."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """What was seen first, and when."""

    step: int
    """First step at which entropy and KL had risen together for a whole window."""
    collapsed_step: int | None
    """First step after it at which the reward had fallen."""

    def __str__(self) -> str:
        rising = f"entropy and KL to the reference rise together from step {self.step}"
        if self.collapsed_step is None:
            return f"{rising}; the reward holds so far: consider an earlier checkpoint or a smaller learning rate"
        return f"{rising}, and the reward falls from step {self.collapsed_step}: use a checkpoint from before"


def collapse_alarm(records: Sequence[Mapping[str, Any]]) -> Alarm | None:
    """Look through `metrics.jsonl` records in order; None where there is nothing to worry about, or too little data."""
    points = [record for record in records if all(record.get(name) is not None for name in (ENTROPY, KL, REWARD))]
    if len(points) < MIN_STEPS:
        return None
    window = max(MIN_WINDOW, len(points) // WINDOWS_PER_RUN)
    entropy, kl, reward = (
        _trailing_means([float(point[name]) for point in points], window) for name in (ENTROPY, KL, REWARD)
    )
    lowest, highest_reward = 0, reward[0]
    rising_for, first = 0, None
    for index in range(1, len(entropy)):
        if entropy[index] < entropy[lowest]:
            lowest = index
        highest_reward = max(highest_reward, reward[index])
        entropy_rises = entropy[index] > max(ENTROPY_RISE * entropy[lowest], entropy[lowest] + ENTROPY_RISE_NATS)
        rising_for = rising_for + 1 if entropy_rises and kl[index] > KL_RISE * kl[lowest] else 0
        step = int(points[index + window - 1]["step"])
        if first is None and rising_for == window:
            first = step
        if first is not None and reward[index] < highest_reward - REWARD_FALL:
            return Alarm(first, step)
    return None if first is None else Alarm(first, None)


def _trailing_means(values: Sequence[float], window: int) -> list[float]:
    return [sum(values[end - window : end]) / window for end in range(window, len(values) + 1)]
