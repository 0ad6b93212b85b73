"""Evaluation over pools that answer from memory: counts, seeds, order, failures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from orchestration.dataset import PromptRow
from orchestration.evaluate import (
    MAX_GROUP,
    EvaluationSettings,
    FinishedCall,
    evaluate,
    evaluation_requests,
    run_calls,
)
from orchestration.failures import InputLost
from orchestration.validate import PromptSet
from reward.verdict import Grade, Verdict
from rollout.request import GroupSummary, RequestSettings, RolloutRequest


def row(name: str) -> PromptRow:
    return PromptRow(name, ({"role": "user", "content": name},), "1", "toy", "math", 1)


def prompt_set(*names: str) -> PromptSet:
    return PromptSet("toy", tuple(map(row, names)), {name: (1, 2, len(name)) for name in names})


class MemoryPools:
    """Answers with the sample index; correct where `is_correct(prompt, index)`; rows come back in reverse order."""

    seats = 32

    def __init__(self, is_correct: Any = lambda prompt, index: index == 0) -> None:
        self.is_correct = is_correct
        self.requests: list[RolloutRequest] = []
        self.in_flight = 0
        self.cancelled = 0

    async def respond(self, requests: Sequence[RolloutRequest]) -> tuple[Any, GroupSummary]:
        self.requests += requests
        self.in_flight += 1
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        rows = list(requests)[::-1]
        summary = GroupSummary(
            group_id=requests[0].group_id,
            request_ids=tuple(request.request_id for request in rows),
            lengths=tuple(10 + request.sample_index for request in rows),
            soft_lengths=tuple(4 for _ in rows),
            oldest_version=3,
            newest_version=5,
            num_truncated=1,
            entropy=0.5,
            top_weight=0.9,
            seconds=0.1,
        )
        return rows, summary

    async def score(self, batch: Any, gold: Any, rule: str) -> list[Grade]:
        return [self.grade(request) for request in batch]

    def grade(self, request: RolloutRequest) -> Grade:
        right = self.is_correct(request.prompt_id, request.sample_index)
        return Grade(Verdict.CORRECT if right else Verdict.INCORRECT, float(right), str(request.sample_index))


def run(pools: Any, *names: str, **settings: Any) -> Any:
    return asyncio.run(evaluate(pools, prompt_set(*names), EvaluationSettings(**settings)))


def test_every_question_gets_its_samples_in_order() -> None:
    pools = MemoryPools(lambda prompt, index: prompt == "easy" or index == 3)
    result = run(pools, "easy", "hard", samples=8)
    assert [question.row.prompt_id for question in result.questions] == ["easy", "hard"]
    hard = result.questions[1]
    assert hard.correct == tuple(index == 3 for index in range(8))
    assert [sample.length for sample in hard.samples] == [10 + index for index in range(8)]
    assert result.pass_at(1) == pytest.approx((1 + 1 / 8) / 2)
    assert result.pass_at(8) == 1.0
    assert result.first(2) == 0.5
    assert result.summary() == {"pass@1": result.pass_at(1), "pass@16": 1.0, "mean_length": 13.5}


def test_many_samples_are_several_calls_with_the_same_seeds_as_one() -> None:
    many, few = MemoryPools(), MemoryPools()
    run(many, "q", samples=2 * MAX_GROUP + 3)
    run(few, "q", samples=5)
    seeds = [request.seed for request in many.requests]
    assert len(set(seeds)) == len(seeds) == 2 * MAX_GROUP + 3
    assert seeds[:5] == [request.seed for request in few.requests]
    assert len({request.request_id for request in many.requests}) == len(seeds)
    assert max(len([r for r in many.requests if r.group_id == g]) for g in {r.group_id for r in many.requests}) == 16


def test_answers_lost_before_they_were_graded_are_generated_again() -> None:
    class Lossy(MemoryPools):
        losses = 2

        async def score(self, batch: Any, gold: Any, rule: str) -> list[Grade]:
            if self.losses:
                self.losses -= 1
                raise InputLost("the node of the batch is gone")
            return await super().score(batch, gold, rule)

    pools = Lossy()
    result = run(pools, "q", samples=4)
    assert len(result.questions[0].samples) == 4
    assert len(pools.requests) == 12 and len({request.seed for request in pools.requests}) == 4


def test_seeds_depend_on_the_evaluation_seed_and_the_question_but_not_on_the_tag() -> None:
    def seeds(*names: str, **settings: Any) -> dict[str, int]:
        pools = MemoryPools()
        run(pools, *names, samples=1, **settings)
        return {request.prompt_id: request.seed for request in pools.requests}

    before, after = seeds("a", "b", tag="step 0"), seeds("b", "a", tag="step 40")
    assert before == after
    assert before["a"] != before["b"]
    assert seeds("a", seed=1)["a"] != before["a"]


def test_metrics_count_failures_of_the_verifier_as_wrong_and_say_so() -> None:
    class Failing(MemoryPools):
        def grade(self, request: RolloutRequest) -> Grade:
            return Grade(Verdict.TIMEOUT, 1.0, None) if request.sample_index == 1 else super().grade(request)

    metrics = run(Failing(lambda *_: True), "q", samples=4).metrics()
    assert metrics["evaluation/toy/pass@1"] == 0.75
    assert metrics["evaluation/toy/verifier_failures"] == 0.25
    assert metrics["evaluation/toy/truncated"] == 0.25
    assert metrics["evaluation/toy/oldest_version"] == 3


def test_a_lost_response_is_an_error_not_a_smaller_sample() -> None:
    class Forgetful(MemoryPools):
        async def score(self, batch: Any, gold: Any, rule: str) -> list[Grade]:
            return (await super().score(batch, gold, rule))[1:]

    with pytest.raises(ValueError, match="4 requests, but 4 responses and 3 grades"):
        run(Forgetful(), "q", samples=4)


def test_an_error_of_a_pool_rises_as_itself_and_stops_the_rest() -> None:
    class Broken(MemoryPools):
        async def respond(self, requests: Sequence[RolloutRequest]) -> tuple[Any, GroupSummary]:
            if requests[0].prompt_id == "bad":
                raise ConnectionError("pool is gone")
            await asyncio.sleep(3600)
            raise AssertionError("unreachable")

    with pytest.raises(ConnectionError, match="pool is gone"):
        run(Broken(), "good", "bad", samples=1)


@pytest.mark.parametrize(
    ("seats", "samples", "beside_training", "calls"),
    [(4, 16, False, 64), (1600, 16, False, 100), (100, 1, False, 100), (401, 4, False, 101), (1600, 16, True, 64)],
)
def test_an_evaluation_alone_fills_the_rollout_actors(
    seats: int, samples: int, beside_training: bool, calls: int
) -> None:
    class Crowded(MemoryPools):
        now = most = 0

        async def respond(self, requests: Sequence[RolloutRequest]) -> tuple[Any, GroupSummary]:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.01)
            self.now -= 1
            return await super().respond(requests)

    pools = Crowded()
    pools.seats = seats
    questions = prompt_set(*(f"q{i}" for i in range(120)))
    asyncio.run(evaluate(pools, questions, EvaluationSettings(samples=samples), beside_training=beside_training))
    assert pools.most == calls


def test_the_limit_holds_and_decoding_travels_with_the_request() -> None:
    pools = MemoryPools()
    decoding = RequestSettings(temperature=0.6)
    result = run(pools, "a", "b", "c", samples=20, limit=2, decoding=decoding)
    assert sorted((question.row.prompt_id, len(question.samples)) for question in result.questions) == [
        ("a", 20),
        ("b", 20),
    ]
    assert {request.settings for request in pools.requests} == {decoding}


def test_run_calls_hands_every_call_over_while_its_trajectories_are_there() -> None:
    seen: list[FinishedCall] = []

    async def hook(call: FinishedCall) -> None:
        seen.append(call)

    prompts, settings = prompt_set("a", "b"), EvaluationSettings(samples=20)
    calls = [(row, part) for row in prompts.rows for part in evaluation_requests(row, prompts, settings)]
    asyncio.run(run_calls(MemoryPools(), calls[1:], hook))
    assert sorted((call.row.prompt_id, len(call.grades)) for call in seen) == [("a", 4), ("b", 4), ("b", 16)]
    assert all(call.batch is not None for call in seen)
