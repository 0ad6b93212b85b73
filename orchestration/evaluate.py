"""Evaluation on the rollout and verifier pools that training uses.

    prompts --requests (own seeds)--> rollout pool --batch ref--> verifier pool --grades--> EvaluationResult

Invariants: every question gets exactly `samples` responses; the seeds depend on the evaluation seed, the question and
the sample only, so two policies (or one policy before and after training) meet the same noise; a grader's failure is
counted and is never a correct answer. Nothing here stops training, and only references to trajectories pass through.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Protocol

from orchestration.dataset import PromptRow
from orchestration.failures import InputLost
from orchestration.statistics import bootstrap_mean, first_k, majority_vote, pass_at_k, reported_ks
from orchestration.validate import PromptSet
from reward.verdict import Grade, Verdict
from rollout.request import GroupSummary, RequestSettings, RolloutRequest, sample_seed

if TYPE_CHECKING:
    import pyarrow as pa
    from ray import ObjectRef

MAX_GROUP = 16
"""Responses of one call; more samples of a question are several calls."""
CALLS_BESIDE_TRAINING = 64
"""Calls in flight while training needs the rollout actors too; alone, an evaluation fills them."""


class Pools(Protocol):
    """What an evaluation needs of the pools."""

    @property
    def seats(self) -> int:
        """Responses that the rollout actors decode at once."""
        ...

    async def respond(self, requests: Sequence[RolloutRequest]) -> tuple[ObjectRef[pa.RecordBatch], GroupSummary]:
        """Generate one group on whichever actor is free."""
        ...

    async def score(self, batch: ObjectRef[pa.RecordBatch], gold: str | dict[str, Any], rule: str) -> list[Grade]:
        """One grade per row of the batch."""
        ...


@dataclass(frozen=True, slots=True)
class TwoPools:
    """`Pools` made of a rollout pool and a verifier pool."""

    rollout: Any
    verifier: Any

    @property
    def seats(self) -> int:
        """See `Pools`."""
        return int(self.rollout.seats)

    async def respond(self, requests: Sequence[RolloutRequest]) -> tuple[Any, GroupSummary]:
        """See `Pools`."""
        answer: tuple[Any, GroupSummary] = await self.rollout.respond(requests)
        return answer

    async def score(self, batch: Any, gold: str | dict[str, Any], rule: str) -> list[Grade]:
        """See `Pools`."""
        grades: list[Grade] = await self.verifier.score(batch, gold, rule)
        return grades


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How a policy is evaluated."""

    samples: int = 16
    """Responses per question."""
    thinking: Literal["soft", "discrete"] = "soft"
    seed: int = 0
    limit: int | None = None
    """Use only the first questions."""
    tag: str = "evaluation"
    """Distinguishes request ids of evaluations that overlap, e.g. `step 40`."""
    decoding: RequestSettings | None = None
    """What differs from the engine's sampling settings."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One graded response."""

    verdict: Verdict
    answer: str | None
    """As extracted."""
    length: int
    soft_length: int

    @property
    def correct(self) -> bool:
        """Whether the verifier accepted it."""
        return self.verdict is Verdict.CORRECT


@dataclass(frozen=True, slots=True)
class QuestionResult:
    """All responses to one question."""

    row: PromptRow
    samples: tuple[Sample, ...]
    num_truncated: int
    entropy: float
    """Mean over soft positions, nats."""
    top_weight: float
    oldest_version: int
    newest_version: int

    @property
    def correct(self) -> tuple[bool, ...]:
        """Per sample."""
        return tuple(sample.correct for sample in self.samples)

    def pass_at(self, k: int) -> float:
        """Unbiased Pass@k of this question."""
        return pass_at_k(len(self.samples), sum(self.correct), k)


@dataclass(frozen=True, slots=True)
class FinishedCall:
    """One generated and graded call, for whoever stores trajectories."""

    row: PromptRow
    requests: tuple[RolloutRequest, ...]
    batch: Any
    """Reference to the trajectories in the object store; None once nobody needs them."""
    summary: GroupSummary
    grades: tuple[Grade, ...]


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """One policy on one dataset."""

    name: str
    settings: EvaluationSettings
    questions: tuple[QuestionResult, ...]
    seconds: float

    def pass_at(self, k: int) -> float:
        """Unbiased Pass@k, mean over questions."""
        return fmean(question.pass_at(k) for question in self.questions)

    def first(self, k: int) -> float:
        """Share of questions solved by one of the first k samples."""
        return fmean(first_k(question.correct, k) for question in self.questions)

    @property
    def majority(self) -> float:
        """Accuracy of the majority vote over all samples."""
        return fmean(
            majority_vote([sample.answer for sample in question.samples], question.correct)
            for question in self.questions
        )

    @property
    def mean_length(self) -> float:
        """Response positions."""
        return fmean(sample.length for question in self.questions for sample in question.samples)

    def summary(self) -> dict[str, float]:
        """The three numbers of `summary.json`; Pass@16 of fewer samples is that of all samples."""
        return {
            "pass@1": self.pass_at(1),
            "pass@16": self.pass_at(min(16, self.settings.samples)),
            "mean_length": self.mean_length,
        }

    def metrics(self) -> dict[str, float]:
        """Metrics `evaluation/<dataset>/<name>`."""
        num_samples = self.settings.samples
        soft = [question for question in self.questions if any(sample.soft_length for sample in question.samples)]
        verdicts = Counter(sample.verdict for question in self.questions for sample in question.samples)
        total = verdicts.total()
        interval = bootstrap_mean([question.pass_at(1) for question in self.questions])
        values = {f"pass@{k}": self.pass_at(k) for k in reported_ks(num_samples)}
        values |= {
            "pass@1_low": interval.low,
            "pass@1_high": interval.high,
            f"pass@{num_samples}": self.pass_at(num_samples),
            f"majority@{num_samples}": self.majority,
            "mean_length": self.mean_length,
            "truncated": sum(question.num_truncated for question in self.questions) / total,
            "verifier_failures": sum(n for verdict, n in verdicts.items() if verdict.is_failure) / total,
            "unparseable": verdicts[Verdict.UNPARSEABLE] / total,
            "never_solved": fmean(not any(question.correct) for question in self.questions),
            "oldest_version": min(question.oldest_version for question in self.questions),
            "seconds": self.seconds,
        }
        if soft:
            values["entropy"] = fmean(question.entropy for question in soft)
            values["top_weight"] = fmean(question.top_weight for question in soft)
        return {f"evaluation/{self.name}/{name}": value for name, value in values.items()}


OnCall = Callable[[FinishedCall], Awaitable[None]]


async def evaluate(
    pools: Pools, prompts: PromptSet, settings: EvaluationSettings, *, beside_training: bool = False
) -> EvaluationResult:
    """Answer and grade every question `settings.samples` times. Errors of the pools propagate."""
    started = time.monotonic()
    rows = prompts.rows[: settings.limit]
    finished: dict[str, list[FinishedCall]] = {row.prompt_id: [] for row in rows}

    async def keep(call: FinishedCall) -> None:
        # Without its reference the object store may drop the trajectories at once.
        finished[call.row.prompt_id].append(replace(call, batch=None))

    calls = [(row, part) for row in rows for part in evaluation_requests(row, prompts, settings)]
    await run_calls(pools, calls, keep, beside_training=beside_training)
    questions = tuple(question_result(finished[row.prompt_id]) for row in rows)
    return EvaluationResult(prompts.name, settings, questions, time.monotonic() - started)


async def run_calls(
    pools: Pools,
    calls: Sequence[tuple[PromptRow, tuple[RolloutRequest, ...]]],
    on_call: OnCall,
    *,
    beside_training: bool = False,
) -> None:
    """Answer and grade calls, many at a time and in any order; `on_call` sees each one when it is done.

    Its trajectories are in the object store for as long as somebody holds their reference. An error of a pool or of
    `on_call` rises at once, after the other calls were cancelled.
    """
    largest = max((len(requests) for _, requests in calls), default=1)
    alone = 0 if beside_training else -(-pools.seats // largest)
    room = asyncio.Semaphore(max(CALLS_BESIDE_TRAINING, alone))

    async def call(row: PromptRow, requests: tuple[RolloutRequest, ...]) -> None:
        async with room:
            grades: list[Grade] | None = None
            while grades is None:
                batch, summary = await pools.respond(requests)
                with suppress(InputLost):  # the batch went with its node: its answers are generated again
                    grades = await pools.score(batch, row.gold, row.rule)
            await on_call(FinishedCall(row, requests, batch, summary, tuple(grades)))

    tasks = [asyncio.create_task(call(row, requests)) for row, requests in calls]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def evaluation_requests(
    row: PromptRow, prompts: PromptSet, settings: EvaluationSettings
) -> list[tuple[RolloutRequest, ...]]:
    """The requests of one question, in calls of at most `MAX_GROUP`."""
    calls = []
    for start in range(0, settings.samples, MAX_GROUP):
        group_id = f"{settings.tag}/{prompts.name}/{row.prompt_id}@{start}"
        calls.append(
            tuple(
                RolloutRequest(
                    request_id=f"{group_id}/{index}",
                    group_id=group_id,
                    prompt_id=row.prompt_id,
                    sample_index=index,
                    seed=sample_seed(settings.seed, f"evaluation/{prompts.name}/{row.prompt_id}", 0, index),
                    prompt_ids=prompts.prompt_ids[row.prompt_id],
                    thinking=settings.thinking,
                    settings=settings.decoding,
                )
                for index in range(start, min(start + MAX_GROUP, settings.samples))
            )
        )
    return calls


def question_result(calls: Sequence[FinishedCall]) -> QuestionResult:
    """Merge the calls of one question, samples in the order of their index."""
    samples = []
    for call in sorted(calls, key=lambda call: call.requests[0].sample_index):
        summary = call.summary
        expected = {request.request_id for request in call.requests}
        if set(summary.request_ids) != expected or len(call.grades) != len(expected):
            raise ValueError(
                f"{summary.group_id}: {len(expected)} requests, but {len(summary.request_ids)} responses and "
                f"{len(call.grades)} grades"
            )
        order = {request_id: place for place, request_id in enumerate(summary.request_ids)}
        for request in call.requests:
            place = order[request.request_id]
            grade = call.grades[place]
            samples.append(Sample(grade.verdict, grade.extracted, summary.lengths[place], summary.soft_lengths[place]))
    soft = [call.summary for call in calls if sum(call.summary.soft_lengths)]
    positions = [sum(summary.soft_lengths) for summary in soft]
    return QuestionResult(
        row=calls[0].row,
        samples=tuple(samples),
        num_truncated=sum(call.summary.num_truncated for call in calls),
        entropy=_weighted([summary.entropy for summary in soft], positions),
        top_weight=_weighted([summary.top_weight for summary in soft], positions),
        oldest_version=min(call.summary.oldest_version for call in calls),
        newest_version=max(call.summary.newest_version for call in calls),
    )


def _weighted(values: Sequence[float], counts: Sequence[int]) -> float:
    total = sum(counts)
    return sum(value * count for value, count in zip(values, counts, strict=True)) / total if total else 0.0
