"""The verifier pool against math-verify called in the main process, one answer after another.

groups: 64 groups of 8 responses with about 3 distinct answers each, the shape of a GRPO batch
distinct: 512 different answers, half of them wrong
hostile: the same with 5 power towers among them, which never return in the main process
"""

from __future__ import annotations

import logging
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from reward.extraction import Answer
from reward.verdict import Grade, Verdict
from reward.verifier import Verifier, VerifierSpec
from tests.benchmarks.row import Row

T = TypeVar("T")
ROUNDS = 3
DEADLINE_S = 5.0
LATE_S = 0.5
NUM_BOMBS = 5
NUM_DISTINCT = 512
NUM_WORDS = 3000
"""Of a response; the published runs average 4 000 to 8 000 tokens."""
_WORDS = ("therefore", "the", "value", "follows", "from", "previous", "line", "and", "we", "check", "it", "again")


@dataclass(frozen=True, slots=True)
class Question:
    """One response to grade."""

    response: str
    gold: str
    correct: bool


def run(names: set[str] | None) -> list[Row]:
    """Rows `verifier/groups`, `verifier/distinct`, `verifier/hostile`."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    rows = []
    if names is None or "verifier/groups" in names:
        rows.append(_compare("verifier/groups", _groups, 5.0))
    if names is None or "verifier/distinct" in names:
        rows.append(_compare("verifier/distinct", _distinct, 1.5))
    if names is None or "verifier/hostile" in names:
        rows.append(_hostile())
    return rows


def _compare(name: str, make: Callable[[int], list[Question]], target: float) -> Row:
    """Median over rounds of (math-verify seconds / pool seconds); new questions in every round, caches warm in both."""
    direct_s, pool_s, ratios = [], [], []
    verifier = _verifier()
    try:
        for number in range(ROUNDS + 1):
            questions = make(number)
            direct, seconds = _timed(lambda questions=questions: [_directly(question) for question in questions])
            grades, pooled = _timed(lambda questions=questions: _grade(verifier, questions))
            _check(questions, direct, grades)
            if number:
                direct_s.append(seconds)
                pool_s.append(pooled)
                ratios.append(seconds / pooled)
    finally:
        verifier.close()
    detail = (
        f"{len(questions)} answers: math-verify {statistics.median(direct_s):.2f} s, pool of {_processes()} "
        f"{statistics.median(pool_s):.3f} s; rounds {', '.join(f'{ratio:.1f}' for ratio in ratios)}; all verdicts "
        f"agree; floor: extraction alone {_extraction_s(questions):.3f} s"
    )
    return Row(name, statistics.median(ratios), target, detail)


def _hostile() -> Row:
    """Throughput of the harmless answers beside bombs, over their throughput alone; gate: no answer is late."""
    questions = _distinct(0)
    bombs = [Question(rf"\boxed{{9^{{9^{{9^{{{9 + i}}}}}}}}}", "1", False) for i in range(NUM_BOMBS)]
    mixed = list(questions)
    for i, bomb in enumerate(bombs):
        mixed.insert(i * len(questions) // NUM_BOMBS, bomb)
    ratios, latest_s = [], 0.0
    for _ in range(ROUNDS):
        verifier = _verifier()
        try:
            _, alone = _timed(lambda verifier=verifier: _grade(verifier, questions))
        finally:
            verifier.close()
        verifier = _verifier()
        try:
            beside, grades = _served_beside(verifier, mixed)
        finally:
            verifier.close()
        timeouts = [grade for grade in grades if grade.verdict is Verdict.TIMEOUT]
        assert len(timeouts) == NUM_BOMBS, f"{len(timeouts)} timeouts for {NUM_BOMBS} bombs"
        latest_s = max(latest_s, *(grade.seconds for grade in grades))
        assert latest_s <= DEADLINE_S + LATE_S, f"an answer took {latest_s:.2f} s with a deadline of {DEADLINE_S} s"
        ratios.append(alone / beside)
    detail = (
        f"{len(mixed)} answers with {NUM_BOMBS} bombs: {NUM_BOMBS} timeouts, no hang, latest verdict after "
        f"{latest_s:.2f} s (deadline {DEADLINE_S:g} s + {LATE_S:g}); harmless answers beside bombs / alone, rounds "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}"
    )
    return Row("verifier/hostile", statistics.median(ratios), 0.5, detail)


def _served_beside(verifier: Verifier, mixed: Sequence[Question]) -> tuple[float, list[Grade]]:
    """Seconds until the last harmless answer had its verdict, and all grades.

    `score` returns when the bombs are done too; the harmless ones are done when their own sub-batch is, so they are
    asked from a second thread right after the bombs went in, as another group would be.
    """
    from concurrent.futures import ThreadPoolExecutor

    harmless = [question for question in mixed if "9^{9^" not in question.response]
    bombs = [question for question in mixed if "9^{9^" in question.response]
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(_grade, verifier, bombs)
        while verifier.stats()["jobs"] < 1:
            time.sleep(0.001)
        grades, seconds = _timed(lambda: _grade(verifier, harmless))
        return seconds, [*grades, *stuck.result(NUM_BOMBS * (DEADLINE_S + 1) + 60)]


def _check(questions: Sequence[Question], direct: Sequence[bool], grades: Sequence[Grade]) -> None:
    """The correctness gate: three opinions of every answer agree."""
    for question, opinion, grade in zip(questions, direct, grades, strict=True):
        pooled = grade.verdict is Verdict.CORRECT
        assert opinion == pooled == question.correct, (question.response[-80:], question.gold, opinion, grade)


def _verifier() -> Verifier:
    verifier = Verifier(VerifierSpec(_processes(), DEADLINE_S, 1024))
    warm = Answer(r"\boxed{x+1}", "")
    verifier.score([warm] * _processes(), [f"{i}+x" for i in range(_processes())], ["math"] * _processes())
    return verifier


def _processes() -> int:
    return min(8, os.cpu_count() or 1)


def _grade(verifier: Verifier, questions: Sequence[Question]) -> list[Grade]:
    answers = [Answer(question.response, question.response) for question in questions]
    return verifier.score(answers, [question.gold for question in questions], ["math"] * len(questions))


def _directly(question: Question) -> bool:
    from math_verify import parse, verify

    return bool(verify(parse(rf"$\boxed{{{question.gold}}}$"), parse(question.response)))


def _extraction_s(questions: Sequence[Question]) -> float:
    from reward.extraction import extract_answer

    answers = [Answer(question.response, question.response) for question in questions]
    return _timed(lambda: [extract_answer(answer) for answer in answers])[1]


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    result = action()
    return result, time.perf_counter() - began


def _groups(seed: int) -> list[Question]:
    """Per group of 8: four answers spelled like the gold one, two right in another spelling, two equal wrong ones."""
    rng = random.Random(seed)
    questions = []
    for number in range(64):
        gold, other, wrong = _answers(rng, number)
        for spelling in [gold] * 4 + [other] * 2 + [wrong] * 2:
            questions.append(Question(_response(rng, spelling), gold, spelling != wrong))
    return questions


def _distinct(seed: int) -> list[Question]:
    """Every second answer is wrong; right ones are written differently from the gold answer."""
    rng = random.Random(1000 + seed)
    questions = []
    for number in range(NUM_DISTINCT):
        gold, other, wrong = _answers(rng, number // 2)
        questions.append(Question(_response(rng, wrong if number % 2 else other), gold, number % 2 == 0))
    return questions


def _answers(rng: random.Random, number: int) -> tuple[str, str, str]:
    """(gold, the same in another spelling, a wrong one), in the proportions of MATH-500's gold answers.

    Those are 62 % integers, 10 % plain fractions, 5 % surds, 4 % tuples, and mostly polynomials; GSM8K, AIME and AMC
    have integers only.
    """
    a, b, c = rng.randrange(2, 9999), rng.randrange(2, 99), rng.randrange(2, 99)
    kind = number % 25
    if kind < 16:
        return str(a * 1000), f"{a * 1000:,}", str(a * 1000 + b)
    if kind < 19:
        value = Fraction(a, b)
        return _fraction(value), f"{value.numerator} / {value.denominator}", _fraction(value + 1)
    if kind < 21:
        return rf"{b}\sqrt{{{c}}}", rf"\sqrt{{{b * b * c}}}", rf"{b + 1}\sqrt{{{c}}}"
    if kind < 24:
        return f"x^2-{b}x+{c}", f"x(x-{b})+{c}", f"x^2-{b}x+{c + 1}"
    return rf"\left({b}, \frac{{\pi}}{{{c}}}\right)", rf"({b},\pi/{c})", rf"({b},\pi/{c + 1})"


def _response(rng: random.Random, answer: str) -> str:
    words = " ".join(rng.choices(_WORDS, k=NUM_WORDS))
    return rf"{words}. So it is $\boxed{{{answer}}}$."


def _fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
