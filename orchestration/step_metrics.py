"""The numbers of one training step, collected on the driver from summaries (never from tensors)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from learner.spec import ScoredGroup
from orchestration.dataset import Visit
from rollout.request import GroupSummary

if TYPE_CHECKING:
    from reward.verdict import Grade


@dataclass(frozen=True, slots=True)
class FinishedGroup:
    """A generated and graded group; `batch` is a reference into the object store."""

    batch: Any
    summary: GroupSummary
    grades: list[Grade]
    visit: Visit

    def scored(self, on_failure: str) -> ScoredGroup:
        """What the learner gets; `on_failure: mask` leaves responses out whose grader failed."""
        keep = tuple(on_failure != "mask" or not grade.verdict.is_failure for grade in self.grades)
        rewards = tuple(grade.reward for grade in self.grades)
        return ScoredGroup(self.summary.group_id, self.batch, rewards, keep)


@dataclass(slots=True)
class StepMetrics:
    """Metrics `area/name` of one step; `groups` keeps the step's groups for trajectory samples."""

    values: dict[str, float] = field(default_factory=dict)
    groups: list[FinishedGroup] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)

    def add(self, name: str, value: float) -> None:
        """Accumulate (several waits or restarts in one step)."""
        self.values[name] = self.values.get(name, 0.0) + value

    def update(self, values: Mapping[str, float]) -> None:
        """Take over the learner's metrics."""
        self.values.update(values)

    def observe(self, group: FinishedGroup, age: int) -> None:
        """A group that this step trains, and its age in versions."""
        self.groups.append(group)
        self.ages.append(age)

    def conclude(
        self, step_s: float, counts: Mapping[str, int], queues: Mapping[str, int], dropped: Mapping[str, int]
    ) -> None:
        """Derive the step's rewards, lengths and staleness from its groups.

        `step_s` is the time since the step before was concluded, whatever it went into. `counts` are the outcomes of
        groups so far, `queues` the groups that wait now, by what they wait for; `dropped` as in `Ledger`.
        """
        summaries = [group.summary for group in self.groups]
        grades = [grade for group in self.groups for grade in group.grades]
        lengths = [length for summary in summaries for length in summary.lengths]
        soft = sum(sum(summary.soft_lengths) for summary in summaries)
        thinking = [summary for summary in summaries if sum(summary.soft_lengths)]
        elapsed = max(step_s, 1e-9)
        verdicts = Counter(grade.verdict for grade in grades)
        spread = [max(g.reward for g in group.grades) > min(g.reward for g in group.grades) for group in self.groups]
        self.values |= {
            "reward/mean": fmean(grade.reward for grade in grades),
            "reward/groups_with_signal": fmean(spread),
            "reward/failures": fmean(grade.verdict.is_failure for grade in grades),
            "rollout/length_mean": fmean(lengths),
            "rollout/length_max": max(lengths),
            "rollout/truncated": sum(summary.num_truncated for summary in summaries) / len(lengths),
            "rollout/soft_share": soft / max(1, sum(lengths)),
            "rollout/group_s": fmean(summary.seconds for summary in summaries),
            "staleness/mean": fmean(self.ages),
            "staleness/max": max(self.ages),
            "throughput/tokens_per_s": sum(lengths) / elapsed,
            "throughput/responses_per_s": len(lengths) / elapsed,
            "time/step_s": step_s,
            "idle/learner": self.values.get("time/learner_wait_s", 0.0) / elapsed,
        }
        self.values |= {f"queue/{pool}": count for pool, count in queues.items()}
        if thinking:
            self.values["rollout/entropy"] = fmean(summary.entropy for summary in thinking)
            self.values["rollout/top_weight"] = fmean(summary.top_weight for summary in thinking)
        self.values |= {f"verdict/{verdict}": count / len(grades) for verdict, count in verdicts.items()}
        self.values |= {f"staleness/age_{age}": count / len(self.ages) for age, count in Counter(self.ages).items()}
        self.values |= {name.replace(" ", "_"): number for name, number in dropped.items()}
        self.values |= {f"groups/{outcome.replace(' ', '_')}": count for outcome, count in counts.items()}
