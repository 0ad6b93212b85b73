"""What a step reports: staleness by age, queues, idle time of the actors, and the line that a person reads."""

from __future__ import annotations

from typing import Any

import pytest

from orchestration import pools
from orchestration.pools import ActorPool
from orchestration.progress import status_line
from orchestration.step_metrics import FinishedGroup, StepMetrics
from reward.verdict import Grade, Verdict
from rollout.request import GroupSummary


def finished(group_id: str, rewards: tuple[float, ...]) -> FinishedGroup:
    summary = GroupSummary(
        group_id=group_id,
        request_ids=tuple(f"{group_id}/{index}" for index in range(len(rewards))),
        lengths=(10,) * len(rewards),
        soft_lengths=(6,) * len(rewards),
        oldest_version=0,
        newest_version=0,
        num_truncated=1,
        entropy=0.5,
        top_weight=0.9,
        seconds=2.0,
    )
    grades = [Grade(Verdict.CORRECT if reward else Verdict.TIMEOUT, reward) for reward in rewards]
    visit: Any = None
    return FinishedGroup(None, summary, grades, visit)


def step_values() -> dict[str, float]:
    metrics = StepMetrics()
    metrics.add("time/learner_wait_s", 1.0)
    metrics.add("time/learner_wait_s", 2.0)
    for number, age in enumerate((0, 0, 1, 3)):
        metrics.observe(finished(f"g{number}", (1.0, 0.0) if number else (1.0, 1.0)), age)
    counts = {"trained": 40, "dropped/age": 2, "dropped/learner lost": 3}
    queues = {"rollout": 5, "verifier": 1, "learner": 2, "backlog": 0}
    metrics.conclude(12.0, counts, queues, {"dropped/learner lost_responses": 2, "dropped/learner lost_tokens": 70})
    return metrics.values


def test_staleness_queues_and_drops_are_counted() -> None:
    values = step_values()
    assert {name: values[name] for name in values if name.startswith("staleness/")} == {
        "staleness/mean": 1.0,
        "staleness/max": 3,
        "staleness/age_0": 0.5,
        "staleness/age_1": 0.25,
        "staleness/age_3": 0.25,
    }
    assert [values[f"queue/{name}"] for name in ("rollout", "verifier", "learner", "backlog")] == [5, 1, 2, 0]
    assert values["groups/dropped/age"] == 2
    assert values["groups/dropped/learner_lost"] == 3
    assert values["dropped/learner_lost_tokens"] == 70
    assert values["time/step_s"] == 12.0
    assert values["idle/learner"] == 0.25
    assert values["reward/groups_with_signal"] == 0.75
    assert values["reward/failures"] == values["verdict/timeout"] == pytest.approx(3 / 8)


def test_the_status_line_names_trouble_only_when_there_is_some() -> None:
    values = step_values() | {"idle/rollout": 0.5, "idle/verifier": 0.991, "failures/rollout_restarts": 1}
    assert status_line(values) == (
        "reward 0.625  length 10.0  staleness 1.0 (max 3)  7 tokens/s  idle rollout 50% verifier 99% learner 25%  "
        "queued 5/1/2  1 restarts  5 dropped"
    )
    calm = {name: value for name, value in values.items() if not name.startswith(("groups/dropped", "failures/"))}
    assert status_line(calm).endswith("queued 5/1/2")


def test_an_actor_is_idle_while_nothing_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(pools.time, "monotonic", lambda: now)
    pool = ActorPool(lambda index: None, 2, startup_timeout_s=1, hang_timeout_s=1, restarts=0)
    first, second = pool.members
    now = 102.0
    first.in_flight += 4
    now = 104.0
    first.in_flight -= 3
    second.in_flight += 1
    now = 106.0
    second.in_flight -= 1
    now = 110.0
    # The first was busy from 102 on, the second from 104 to 106.
    assert pool.take_idle_share() == pytest.approx(1 - (8 + 2) / 20)
    now = 114.0
    assert pool.take_idle_share() == pytest.approx(0.5), "only what happened since the last call"
