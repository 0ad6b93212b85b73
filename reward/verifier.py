"""Grading many answers: rules, the cache, the sandbox, and the counts of what came out.

answers -> rule terms -> settled at once | cache | sandbox -> Grade per answer, in order
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from reward.confinement import Limits
from reward.extraction import Answer
from reward.rules import RULES, Gold, RuleError, Score, Task, Term, parse_rule
from reward.sandbox import Job, Outcome, Sandbox, SandboxError
from reward.verdict import Grade, Verdict

logger = logging.getLogger(__name__)

_ALARM_WINDOW = 512
_ALARM_MINIMUM = 32
_SLACK_S = 120.0


@dataclass(frozen=True, slots=True)
class VerifierSpec:
    """How one verifier works; plain data."""

    processes: int = 1
    """Warm grader children."""
    deadline_s: float = 5.0
    """Wall clock per answer."""
    memory_mb: int = 2048
    """Per child, beyond what an idle one maps."""
    user_rule: str | None = None
    """`module:function` behind the rule name `user`."""
    recycle_after: int = 2000
    """Answers that a child grades before it is replaced."""
    cache_size: int = 65_536
    """Remembered verdicts."""
    failure_alarm: float = 0.2
    """Share of timeouts, crashes and memory failures among the last answers that is logged as an alarm."""


class Verifier:
    """Grades answers in killable children; safe to use from several threads."""

    def __init__(self, spec: VerifierSpec) -> None:
        self._spec = spec
        limits = Limits(spec.memory_mb, spec.deadline_s)
        self._sandbox = Sandbox(
            limits, processes=spec.processes, recycle_after=spec.recycle_after, user_rule=spec.user_rule
        )
        self._lock = threading.Lock()
        self._cache: OrderedDict[Hashable, Outcome] = OrderedDict()
        self._in_flight: dict[Hashable, Future[Outcome]] = {}
        self._verdicts: Counter[Verdict] = Counter()
        self._cache_hits = 0
        self._recent: deque[bool] = deque(maxlen=_ALARM_WINDOW)
        self._alarmed = False

    def score(self, answers: Sequence[Answer], golds: Sequence[Gold], rules: Sequence[str]) -> list[Grade]:
        """One grade per answer, in order. Raises `RuleError` for an unknown rule, `SandboxError` if grading broke."""
        begun = [
            [self._begin(term, answer, gold) for term in self._terms(rule)]
            for answer, gold, rule in zip(answers, golds, rules, strict=True)
        ]
        give_up = time.monotonic() + sum(map(len, begun)) * (self._spec.deadline_s + 1) + _SLACK_S
        grades = [
            _combine(self._terms(rule), [_finish(step, give_up) for step in steps])
            for rule, steps in zip(rules, begun, strict=True)
        ]
        self._count(grades)
        return grades

    def audit(self, golds: Sequence[Gold], rules: Sequence[str]) -> list[str | None]:
        """Why each gold value cannot be used with its rule; None where it can."""
        checks: list[str | Task | None] = []
        for gold, rule in zip(golds, rules, strict=True):
            problem: str | Task | None = None
            for term in self._terms(rule):
                try:
                    problem = problem or RULES[term.name].check_gold(gold)
                except RuleError as error:
                    problem = str(error)
            checks.append(problem)
        futures = [self._sandbox.submit(_job(check)) if isinstance(check, Task) else check for check in checks]
        give_up = time.monotonic() + len(checks) * (self._spec.deadline_s + 1) + _SLACK_S
        return [_problem(_wait(found, give_up)) if isinstance(found, Future) else found for found in futures]

    def stats(self) -> dict[str, float]:
        """Counters since the start: one per verdict, cache hits, children."""
        with self._lock:
            counts = {f"verdict_{verdict.value}": float(self._verdicts[verdict]) for verdict in Verdict}
            recent = sum(self._recent) / len(self._recent) if self._recent else 0.0
            hits = float(self._cache_hits)
        sandbox = {name: float(value) for name, value in self._sandbox.stats().items()}
        return {**counts, "recent_failure_share": recent, "cache_hits": hits, **sandbox}

    @property
    def isolation(self) -> str:
        """See `Sandbox.isolation`."""
        return self._sandbox.isolation

    def close(self) -> None:
        """End all children."""
        self._sandbox.close()

    def _terms(self, rule: str) -> tuple[Term, ...]:
        terms = parse_rule(rule)
        if self._spec.user_rule is None and any(term.name == "user" for term in terms):
            raise RuleError(f"rule {rule!r}: no user rule is configured; set reward.user_rule to module:function")
        return terms

    def _begin(self, term: Term, answer: Answer, gold: Gold) -> Score | tuple[Task, Future[Outcome]]:
        try:
            step = RULES[term.name].apply(answer, gold, term.arguments)
        except RuleError as error:
            return Score(Verdict.CRASH, 0.0, None, f"rule {term.name}: {error}")
        if isinstance(step, Score):
            return step
        return step, self._submit(step)

    def _submit(self, task: Task) -> Future[Outcome]:
        """The verdict of a task: remembered, already being found, or asked of the sandbox."""
        if task.key is None:
            return self._sandbox.submit(_job(task))
        with self._lock:
            known = self._cache.get(task.key)
            if known is not None:
                self._cache.move_to_end(task.key)
                self._cache_hits += 1
                done: Future[Outcome] = Future()
                done.set_result(known)
                return done
            shared = self._in_flight.get(task.key)
            if shared is not None:
                self._cache_hits += 1
                return shared
            future = self._sandbox.submit(_job(task))
            self._in_flight[task.key] = future
        future.add_done_callback(lambda done: self._remember(task.key, done))
        return future

    def _remember(self, key: Hashable, done: Future[Outcome]) -> None:
        """Keep a verdict; a failure may be the machine's fault and is tried again next time."""
        with self._lock:
            self._in_flight.pop(key, None)
            if done.exception() is None and not done.result().verdict.is_failure:
                outcome = done.result()
                self._cache[key] = Outcome(outcome.verdict, 0.0, outcome.detail, outcome.reward)
                while len(self._cache) > self._spec.cache_size:
                    self._cache.popitem(last=False)

    def _count(self, grades: Sequence[Grade]) -> None:
        with self._lock:
            self._verdicts.update(grade.verdict for grade in grades)
            self._recent.extend(grade.verdict.is_failure for grade in grades)
            share = sum(self._recent) / len(self._recent) if self._recent else 0.0
            alarming = len(self._recent) >= _ALARM_MINIMUM and share >= self._spec.failure_alarm
            newly, self._alarmed = alarming and not self._alarmed, alarming
        if newly:
            failed = next((grade for grade in grades if grade.verdict.is_failure), None)
            logger.error(
                "verifier alarm: %.0f %% of the last %d answers could not be graded (limit %.0f %%); latest: %s",
                100 * share,
                len(self._recent),
                100 * self._spec.failure_alarm,
                f"{failed.verdict}: {failed.detail}" if failed else "none in this batch",
            )


def _job(task: Task) -> Job:
    return Job(task.payload, task.confined, burns_cpu=task.payload["task"] in ("math", "check_gold"))


def _finish(step: Score | tuple[Task, Future[Outcome]], give_up: float) -> tuple[Score, float]:
    """A term's score and the seconds a child took."""
    if isinstance(step, Score):
        return step, 0.0
    task, future = step
    outcome = _wait(future, give_up)
    reward = outcome.reward
    if reward is None or outcome.verdict.is_failure:
        reward = 1.0 if outcome.verdict is Verdict.CORRECT else 0.0
    return Score(outcome.verdict, reward, task.extracted, outcome.detail), outcome.seconds


def _wait(future: Future[Outcome], give_up: float) -> Outcome:
    try:
        return future.result(max(0.0, give_up - time.monotonic()))
    except FutureTimeoutError:
        raise SandboxError("the sandbox resolved no verdict in time: its dispatcher should have, see its log") from None


def _combine(terms: Sequence[Term], scores: Sequence[tuple[Score, float]]) -> Grade:
    """The weighted sum, under the first term's verdict; a failed term fails the answer."""
    seconds = sum(spent for _, spent in scores)
    first = scores[0][0]
    for score, _ in scores:
        if score.verdict.is_failure:
            return Grade(score.verdict, 0.0, first.extracted, seconds, score.detail)
    reward = sum(term.weight * score.reward for term, (score, _) in zip(terms, scores, strict=True))
    detail = "; ".join(score.detail for score, _ in scores if score.detail)
    return Grade(first.verdict, reward, first.extracted, seconds, detail)


def _problem(outcome: Outcome) -> str | None:
    if outcome.verdict is Verdict.CORRECT:
        return None
    return outcome.detail if outcome.verdict is Verdict.INCORRECT else f"{outcome.verdict}: {outcome.detail}"
