from __future__ import annotations

import logging
import re
import time
from collections import Counter

import psutil
import pytest

from reward.extraction import Answer
from reward.rules import RuleError
from reward.verdict import Grade, Verdict
from reward.verifier import Verifier, VerifierSpec
from tests.reward.conftest import BUSY_S, MEMORY_MB, assert_gone
from tests.reward.hostile import TOWER, bombs, hostile_answers

DEADLINE_S = 0.5


def grade_all(verifier: Verifier, texts: list[str], gold: str = "42", rule: str = "math") -> list[Grade]:
    return verifier.score([Answer(text, text) for text in texts], [gold] * len(texts), [rule] * len(texts))


def test_hostile_corpus() -> None:
    """Every answer gets a verdict in time, none is correct, the verifier works on, nothing is left behind."""
    corpus = hostile_answers()
    assert len(corpus) >= 200
    verifier = Verifier(VerifierSpec(2, DEADLINE_S, MEMORY_MB))
    server = psutil.Process(int(verifier.stats()["server_pid"]))
    began = time.monotonic()
    grades = grade_all(verifier, corpus)
    spent_s = time.monotonic() - began
    late = [
        (text[:60], grade) for text, grade in zip(corpus, grades, strict=True) if grade.seconds > DEADLINE_S + BUSY_S
    ]
    assert not late
    fooled = [text[:80] for text, grade in zip(corpus, grades, strict=True) if grade.verdict is Verdict.CORRECT]
    assert not fooled
    counts = Counter(grade.verdict for grade in grades)
    assert counts[Verdict.TIMEOUT] >= 5, counts
    assert spent_s < (counts[Verdict.TIMEOUT] + 10) * (DEADLINE_S + BUSY_S)
    assert grade_all(verifier, [r"\boxed{6\cdot 7}"])[0].verdict is Verdict.CORRECT
    family = [server, *server.children(recursive=True)]
    verifier.close()
    assert_gone(family)


def test_grades_come_in_order_and_are_counted(hasty: Verifier) -> None:
    before = hasty.stats()
    texts = [r"\boxed{6\cdot 7}", r"\boxed{7}", TOWER, r"\boxed{\frac}", "", r"\boxed{42}"]
    grades = grade_all(hasty, texts)
    wanted = ["correct", "incorrect", "timeout", "unparseable", "unparseable", "correct"]
    assert [grade.verdict.value for grade in grades] == wanted
    assert [grade.reward for grade in grades] == [1, 0, 0, 0, 0, 1]
    assert grades[0].extracted == r"6\cdot 7" and grades[4].extracted is None
    assert re.fullmatch(r"no verdict within 2 s \(\d\.\d\d s of CPU\); killed", grades[2].detail)
    counted = {name: value - before[name] for name, value in hasty.stats().items() if name.startswith("verdict_")}
    assert counted == {
        "verdict_correct": 2,
        "verdict_incorrect": 1,
        "verdict_unparseable": 2,
        "verdict_timeout": 1,
        "verdict_out_of_memory": 0,
        "verdict_crash": 0,
    }


def test_equal_answers_are_graded_once(verifier: Verifier) -> None:
    before = verifier.stats()
    grades = grade_all(verifier, [r"\boxed{21\cdot 2}"] * 8 + [r"so, \boxed{ 21\cdot 2 }"] * 8)
    grades += grade_all(verifier, [r"\boxed{21\cdot 2}"])
    assert {grade.verdict for grade in grades} == {Verdict.CORRECT}
    assert verifier.stats()["jobs"] == before["jobs"] + 1
    assert verifier.stats()["cache_hits"] == before["cache_hits"] + 16


def test_siblings_share_a_bomb_but_failures_are_not_remembered(hasty: Verifier) -> None:
    before = hasty.stats()["jobs"]
    assert {grade.verdict for grade in grade_all(hasty, bombs(1) * 8)} == {Verdict.TIMEOUT}
    assert hasty.stats()["jobs"] == before + 1
    grade_all(hasty, bombs(1))
    assert hasty.stats()["jobs"] == before + 2


def test_weighted_rules(verifier: Verifier) -> None:
    answer = Answer(r"<think>hm</think>\boxed{6\cdot 7}", r"\boxed{6\cdot 7}", "stop", 150)
    (grade,) = verifier.score([answer], ["42"], ["math + 0.25*format + length(100, 200)"])
    assert grade.verdict is Verdict.CORRECT and grade.reward == pytest.approx(1 + 0.25 - 0.5)
    wrong = Answer(r"<think>hm</think>\boxed{41}", r"\boxed{41}", "stop", 10)
    (grade,) = verifier.score([wrong], ["42"], ["math + 0.25*format + length(100, 200)"])
    assert grade.verdict is Verdict.INCORRECT and grade.reward == 0.25


def test_a_failed_term_fails_the_answer(hasty: Verifier) -> None:
    (grade,) = grade_all(hasty, [TOWER], rule="0.5*format + math")
    assert grade.verdict is Verdict.TIMEOUT and grade.reward == 0


def test_user_rule_and_its_traceback(verifier: Verifier) -> None:
    good, bad = grade_all(verifier, ["abcd", "fail"], gold="8", rule="user")
    assert good.verdict is Verdict.CORRECT and good.reward == 0.5
    assert bad.verdict is Verdict.CRASH and bad.reward == 0
    assert "user_rules.py" in bad.detail and "the user's own mistake" in bad.detail


def test_a_missing_user_rule_is_a_crash_that_names_it() -> None:
    verifier = Verifier(VerifierSpec(1, 60.0, MEMORY_MB, user_rule="no_such_module:reward"))
    try:
        (grade,) = grade_all(verifier, ["x"], rule="user")
        assert grade.verdict is Verdict.CRASH and "no_such_module" in grade.detail
    finally:
        verifier.close()


def test_unknown_rules_and_unconfigured_user_rules_are_errors() -> None:
    verifier = Verifier(VerifierSpec(1, 60.0, MEMORY_MB))
    try:
        with pytest.raises(RuleError, match="unknown rule"):
            grade_all(verifier, ["1"], rule="maths")
        with pytest.raises(RuleError, match=r"reward\.user_rule"):
            grade_all(verifier, ["1"], rule="user")
    finally:
        verifier.close()


def test_gold_audit(hasty: Verifier) -> None:
    golds = ["42", r"\frac", "", "B", "many", "3.5", {"test_list": ["assert 1"]}, {"tests": []}, r"\boxed{9^{9^{9^9}}}"]
    rules = ["math", "math", "math", "choice", "numeric", "numeric", "code", "code", "math"]
    problems = hasty.audit(golds, rules)
    assert [bool(problem) for problem in problems] == [False, True, True, False, True, False, False, True, True]
    assert "cannot be parsed" in str(problems[1]) and "timeout" in str(problems[8])
    assert hasty.audit([{"a": 1}, "x"], ["math", "math + 0.1*format"])[0] is not None


def test_alarm_when_the_grader_fails(verifier: Verifier, caplog: pytest.LogCaptureFixture) -> None:
    """A rule that always crashes must not look like a policy that always fails."""
    grade_all(verifier, [f"{i}" for i in range(200)], gold="1", rule="exact")
    with caplog.at_level(logging.ERROR):
        grades = grade_all(verifier, [f"fail {i}" for i in range(150)], gold="1", rule="user")
    assert {grade.verdict for grade in grades} == {Verdict.CRASH}
    assert "verifier alarm" in caplog.text and "mistake" in caplog.text
    assert verifier.stats()["recent_failure_share"] > 0.2
