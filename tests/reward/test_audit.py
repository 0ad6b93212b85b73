from __future__ import annotations

import json
from pathlib import Path

import pytest

from reward.audit import audit_gold
from reward.rules import RuleError
from reward.verifier import VerifierSpec

SPEC = VerifierSpec(2, 5.0, 512)


def test_bad_golds_are_named_with_their_reason() -> None:
    golds = ["42", r"\frac", "", r"9^{9^{9^9}}", "x+1", "x+1", {"test_list": ["assert 1"]}, {"tests": 1}, "Q7", "E"]
    rules = ["math"] * 6 + ["code", "code", "choice", "choice + 0.1*format"]
    problems = audit_gold(golds, rules, VerifierSpec(2, 1.0, 512))
    assert [bool(problem) for problem in problems] == [False, True, True, True, False, False, False, True, True, False]
    assert "cannot be parsed" in str(problems[1]) and "empty" in str(problems[2]) and "timeout" in str(problems[3])


def test_rules_are_checked_first() -> None:
    with pytest.raises(RuleError, match="known: math"):
        audit_gold(["1"], ["maths"], SPEC)
    with pytest.raises(RuleError, match="user_rule"):
        audit_gold(["1"], ["math + user"], SPEC)


def test_plain_numbers_and_text_rules_start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward.audit.Verifier", None)
    assert audit_gold(["42", "-3.5", "B"], ["math", "math", "choice"], SPEC) == [None] * 3


def test_the_golds_of_real_benchmarks_pass() -> None:
    golds = json.loads((Path(__file__).parent / "golden" / "gold_answers.json").read_text(encoding="utf-8"))[::4]
    assert audit_gold(golds, ["math"] * len(golds), VerifierSpec(2, 30.0, 512)) == [None] * len(golds)
