from __future__ import annotations

import pytest

from reward.extraction import Answer
from reward.rules import RULES, Gold, RuleError, Score, Task, Term, parse_rule
from reward.verdict import Verdict

LONG = "and more words " * 30


def apply(rule: str, answer: Answer | str, gold: Gold = "") -> Score:
    if isinstance(answer, str):
        answer = Answer(answer, answer)
    (term,) = parse_rule(rule)
    score = RULES[term.name].apply(answer, gold, term.arguments)
    assert isinstance(score, Score)
    return score


def test_rule_expressions() -> None:
    assert parse_rule("math") == (Term("math"),)
    assert parse_rule("math + 0.1*format") == (Term("math"), Term("format", 0.1))
    assert parse_rule("math+-.5 * length(6144, 8192)") == (Term("math"), Term("length", -0.5, (6144.0, 8192.0)))
    assert parse_rule("1e-1*numeric(1e+2)") == (Term("numeric", 0.1, (100.0,)),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maths", "unknown rule 'maths'; known: math, math_string"),
        ("", "cannot read"),
        ("math +", "cannot read"),
        ("math - format", "cannot read"),
        ("2*", "cannot read"),
        ("length", "length takes 2 arguments, found 0"),
        ("length(5, 5)", "start < limit"),
        ("numeric(a)", "are numbers"),
        ("numeric(-1)", "not be negative"),
        ("math(3)", "math takes 0 arguments"),
    ],
)
def test_bad_rule_expressions_are_explained(text: str, message: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_rule(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "gold", "verdict"),
    [
        (r"\boxed{B}", "B", Verdict.CORRECT),
        (r"\boxed{\text{(B)}}", "B", Verdict.CORRECT),
        (r"\boxed{B. Paris}", "(B)", Verdict.CORRECT),
        ("The correct answer is (C).", "C", Verdict.CORRECT),
        ('{"answer": "D"}', "D", Verdict.CORRECT),
        ("Option A is wrong. Answer: **B**", "B", Verdict.CORRECT),
        ("b", "B", Verdict.CORRECT),
        ("B", "C", Verdict.INCORRECT),
        ("I think it could be any", "I", Verdict.UNPARSEABLE),
        (r"\boxed{Bismuth}", "B", Verdict.UNPARSEABLE),
        ("", "B", Verdict.UNPARSEABLE),
        ("B) because", "B", Verdict.CORRECT),
        (r"\boxed{(B) 42}", "B", Verdict.CORRECT),
        (r"\boxed{B) 42}", "B", Verdict.CORRECT),
        (r"\boxed{\text{(B) } 42}", "B", Verdict.CORRECT),
        (r"\boxed{C. K}", "C", Verdict.CORRECT),
        (r"\boxed{(A) or (B)}", "A", Verdict.UNPARSEABLE),
        (r"\boxed{A. or B.}", "A", Verdict.UNPARSEABLE),
        (r"\boxed{(A)(B)}", "A", Verdict.UNPARSEABLE),
        (r"\boxed{(A + B)}", "A", Verdict.UNPARSEABLE),
        ("A) is wrong, B) is right", "A", Verdict.UNPARSEABLE),
        (f"The correct answer is (C). {LONG} Option A is wrong since it ignores friction.", "C", Verdict.CORRECT),
        (f"Option A is wrong. {LONG} I go with option B.", "B", Verdict.CORRECT),
        ("Answer: B. No, wait. Answer: C", "C", Verdict.CORRECT),
        ("Answer: C\n\nThis is the only choice I can justify.", "C", Verdict.CORRECT),
        (f"The answer I get is C. {LONG}", "C", Verdict.CORRECT),
        (f"This is the only choice I can justify. {LONG}", "I", Verdict.UNPARSEABLE),
        ("Answer: I think it is B", "I", Verdict.UNPARSEABLE),
        ("The answer is I.", "I", Verdict.CORRECT),
        ("Answer **I**", "I", Verdict.CORRECT),
        ("I go with option A.", "A", Verdict.CORRECT),
        ("No option A student would take", "A", Verdict.UNPARSEABLE),
        ("Therefore, option A is correct.", "A", Verdict.CORRECT),
        ("I pick option A since x", "A", Verdict.CORRECT),
        ("Only option A works.", "A", Verdict.CORRECT),
        ("No option (A) student would take", "A", Verdict.CORRECT),
        (f"Answer: $B$ {LONG}", "B", Verdict.CORRECT),
        (rf"Answer: $\text{{B}}$ {LONG}", "B", Verdict.CORRECT),
        (r"The answer is \(B\).", "B", Verdict.CORRECT),
        ("**Answer**: B", "B", Verdict.CORRECT),
        ("The answer is A or B", "A", Verdict.UNPARSEABLE),
        ("The answer is (A)/(B)", "A", Verdict.UNPARSEABLE),
        ("The answer is not A", "A", Verdict.UNPARSEABLE),
    ],
)
def test_choice(text: str, gold: str, verdict: Verdict) -> None:
    assert apply("choice", text, gold).verdict is verdict


@pytest.mark.parametrize(
    ("text", "gold", "verdict"),
    [
        (r"\boxed{Paris}", "Paris", Verdict.CORRECT),
        ("  New   York ", "New York", Verdict.CORRECT),
        ("the answer is Rome.", "Rome", Verdict.CORRECT),
        (r"\boxed{paris}", "Paris", Verdict.INCORRECT),
        ("", "Paris", Verdict.UNPARSEABLE),
    ],
)
def test_exact(text: str, gold: str, verdict: Verdict) -> None:
    assert apply("exact", text, gold).verdict is verdict


@pytest.mark.parametrize(
    ("rule", "text", "gold", "verdict"),
    [
        ("numeric", r"\boxed{1,234.5}", "1234.5", Verdict.CORRECT),
        ("numeric", r"\boxed{\$12}", "12", Verdict.CORRECT),
        ("numeric", r"\boxed{3/4}", r"\frac{3}{4}", Verdict.CORRECT),
        ("numeric", r"\boxed{-\frac{3}{4}}", "-0.75", Verdict.CORRECT),
        ("numeric", r"\boxed{3.14}", "3.14159", Verdict.INCORRECT),
        ("numeric(0.001)", r"\boxed{3.14}", "3.14159", Verdict.CORRECT),
        ("numeric(0.01)", r"\boxed{1000}", "1009", Verdict.CORRECT),
        ("numeric", r"\boxed{1 1/2}", "1.5", Verdict.CORRECT),
        ("numeric", r"\boxed{1 1/2}", "5.5", Verdict.INCORRECT),
        ("numeric", r"\boxed{-1\frac{1}{2}}", "-1.5", Verdict.CORRECT),
        ("numeric", r"\boxed{10\,000}", "10000", Verdict.CORRECT),
        ("numeric", r"\boxed{12,34,567}", "1234567", Verdict.CORRECT),
        ("numeric", "11111111100", r"11,\! 111,\!111,\! 100", Verdict.CORRECT),
        ("numeric", r"\boxed{1, 2}", "12", Verdict.UNPARSEABLE),
        ("numeric", r"\boxed{1,2}", "12", Verdict.UNPARSEABLE),
        ("numeric", r"\boxed{1 2}", "12", Verdict.UNPARSEABLE),
        ("numeric", r"\boxed{1\,2}", "12", Verdict.UNPARSEABLE),
        ("numeric", r"\boxed{1_2}", "12", Verdict.UNPARSEABLE),
        ("numeric", "\\boxed{\N{MINUS SIGN}5 \\%}", "-5", Verdict.CORRECT),
        ("numeric", "The answer is 42. I hope this answer is helpful!", "42", Verdict.CORRECT),
        ("numeric", r"\boxed{many}", "3", Verdict.UNPARSEABLE),
        ("numeric", r"\boxed{nan}", "3", Verdict.UNPARSEABLE),
        ("numeric", r"\boxed{1/0}", "3", Verdict.UNPARSEABLE),
        ("numeric", r"\boxed{" + "9" * 1000 + "}", "3", Verdict.UNPARSEABLE),
        ("numeric", r"\boxed{1e999999999}", "3", Verdict.UNPARSEABLE),
        ("numeric", r"\boxed{1/1e999999999}", "3", Verdict.INCORRECT),
        ("numeric", r"\boxed{1e999999999/1e999999999}", "1", Verdict.UNPARSEABLE),
    ],
)
def test_numeric(rule: str, text: str, gold: str, verdict: Verdict) -> None:
    assert apply(rule, text, gold).verdict is verdict


@pytest.mark.parametrize(
    ("response", "answer", "finish", "problem"),
    [
        (r"<think>a</think>so \boxed{1}", r"so \boxed{1}", "stop", ""),
        (r"a so \boxed{1}", r"so \boxed{1}", "stop", ""),
        (r"<think>a</think>so \boxed{1}", "", "stop", ""),
        (r"a \boxed{1}", "", "stop", "not closed"),
        (r"<think>a</think><think>b</think>\boxed{1}", r"<think>b</think>\boxed{1}", "stop", "more than one"),
        (r"a</think>\boxed{1} \boxed{2}", r"\boxed{1} \boxed{2}", "stop", "2 boxed"),
        (r"a</think>1", "1", "stop", "0 boxed"),
        (r"a</think>\boxed{1}", r"\boxed{1}", "length", "cut off"),
    ],
)
def test_format(response: str, answer: str, finish: str, problem: str) -> None:
    score = apply("format", Answer(response, answer, finish))
    assert score.reward == (0.0 if problem else 1.0) and problem in score.detail


@pytest.mark.parametrize(("tokens", "reward"), [(0, 0.0), (100, 0.0), (150, -0.5), (200, -1.0), (9999, -1.0)])
def test_length_penalty_is_linear(tokens: int, reward: float) -> None:
    assert apply("length(100, 200)", Answer("", num_tokens=tokens)).reward == reward


def test_length_needs_token_counts() -> None:
    with pytest.raises(RuleError, match="number of tokens"):
        apply("length(1, 2)", "text")


def test_mathematics_that_needs_no_mathematics_is_settled_at_once() -> None:
    assert apply("math", r"\boxed{ \frac12 }", r"\frac12").verdict is Verdict.CORRECT
    step = RULES["math"].apply(Answer(r"\boxed{0.5}", ""), r"\frac12", ())
    assert isinstance(step, Task) and step.extracted == "0.5" and not step.confined


def test_text_rules_refuse_objects() -> None:
    with pytest.raises(RuleError, match="keys"):
        apply("exact", "1", {"tests": []})
