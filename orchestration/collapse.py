"""What a report says about collapse: the learner's warning (KL and entropy rise together), and whether the reward fell.

The rule is `learner.collapse_watch`; runs whose metrics were written without it are replayed through the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from learner.collapse_watch import CollapseWatch

WARNING = "objective/collapse_warning"
REWARD = "reward/mean"
REWARD_FALL = 0.05
"""Below the highest mean so far: the collapse itself."""
REWARD_WINDOW = 10
"""Steps of a mean."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """What was seen first, and when."""

    step: int
    """First step with the warning."""
    collapsed_step: int | None
    """First step after it at which the reward had fallen."""

    def __str__(self) -> str:
        rising = f"Entropy and KL to the reference were found rising together at step {self.step}"
        if self.collapsed_step is None:
            return f"{rising}; the reward holds so far: consider an earlier checkpoint or a smaller learning rate."
        return f"{rising}, and the reward fell by step {self.collapsed_step}: use a checkpoint from before."


def collapse_alarm(records: Sequence[Mapping[str, Any]]) -> Alarm | None:
    """Look through `metrics.jsonl` records in order; None where there is nothing to worry about."""
    steps = [record for record in records if record.get(REWARD) is not None]
    if not any(WARNING in record for record in steps):
        watch = CollapseWatch()
        steps = [{**record, WARNING: float(watch.observe(_finite(record)) is not None)} for record in steps]
    warned = next((index for index, record in enumerate(steps) if record.get(WARNING)), None)
    if warned is None:
        return None
    rewards = [float(record[REWARD]) for record in steps]
    best = 0.0
    for index in range(REWARD_WINDOW, len(rewards) + 1):
        mean = sum(rewards[index - REWARD_WINDOW : index]) / REWARD_WINDOW
        best = max(best, mean)
        if index > warned and mean < best - REWARD_FALL:
            return Alarm(int(steps[warned]["step"]), int(steps[index - 1]["step"]))
    return Alarm(int(steps[warned]["step"]), None)


def _finite(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if value is not None}
