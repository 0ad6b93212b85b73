from __future__ import annotations

import json
import logging
import random
import time
from pathlib import Path

import pytest

from reward.extraction import MAX_TEXT_CHARS, Answer, Extracted, extract_answer, last_boxed, nesting_depth
from reward.math import check_gold, grade, settle
from reward.verdict import Verdict


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{4} wait, \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x }", r"\left\{ x"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed 7 apples", "7"),
        (r"$\boxed7$", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxedanswer", None),
        ("42", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Therefore the answer is 12.", "12"),
        ("**Answer:** $x^2$\nbye", "$x^2$"),
        ("#### 18", "18"),
        ("answer: 3\nno, the final answer is 4", "4"),
        ("The answer is unknown, \\boxed{9}", "9"),
        ("The answer is 42. I hope this answer is helpful!", "42"),
        ("The answer is $x$.\nThe answer is correct. Is the answer is clear?", "$x$"),
        ("Answer: 5. No, the answer is undefined.", "undefined"),
        ("The answer is Rome. I hope this answer is helpful!", "helpful!"),
        ("answer: 7\nThe answer is right at 3", "right at 3"),
        ("The final answer is:\n$$\n42\n$$\nbye", "$42$"),
        ("The final answer is:\n\\[\n  x +\n1\n\\]", "$x + 1$"),
        ("The answer is $$x$$.", "$x$"),
    ],
)
def test_final_phrase(text: str, answer: str) -> None:
    extracted = extract_answer(Answer(text, text))
    assert extracted is not None and extracted.text == answer


def test_unfinished_thinking_counts_only_with_a_marker() -> None:
    thinking = "so 6 times 7 is 42 " * 40
    assert extract_answer(Answer(thinking, "", "length")) is None
    assert extract_answer(Answer("42", "", "length")) is None
    assert extract_answer(Answer(thinking + r"\boxed{42}", "", "length")) is not None
    after_thinking = extract_answer(Answer(thinking + "</think>It is 42", "It is 42"))
    assert after_thinking is not None and after_thinking.text == "It is 42"


def test_nesting_depth() -> None:
    assert nesting_depth("((1)[2{3}])") == 3
    assert nesting_depth(")))((") == 0
    assert nesting_depth("(" * 100) == 100


@pytest.mark.parametrize(
    ("response", "gold", "verdict"),
    [
        (r"\boxed{42}", "42", Verdict.CORRECT),
        (r"\boxed{1,000}", "1000", Verdict.CORRECT),
        (r"\boxed{2.0}", "2", Verdict.CORRECT),
        (r"\boxed{-\frac{1}{3}}", "-1/3", Verdict.CORRECT),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", Verdict.CORRECT),
        (r"\boxed{x=5}", "5", Verdict.CORRECT),
        (r"\boxed{50\%}", "0.5", Verdict.CORRECT),
        (r"\boxed{(3,\frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", Verdict.CORRECT),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", Verdict.CORRECT),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", Verdict.CORRECT),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", Verdict.CORRECT),
        ("42", "42", Verdict.CORRECT),
        (r"\boxed{18}", "2 * 9 = 18\n#### 18", Verdict.CORRECT),
        (r"\boxed{18}", "$18$", Verdict.CORRECT),
        (r"\boxed{4} no, \boxed{5}", "5", Verdict.CORRECT),
        (r"\boxed{5} no, \boxed{4}", "5", Verdict.INCORRECT),
        (r"\boxed{43}", "42", Verdict.INCORRECT),
        ("it has no answer " * 30, "42", Verdict.UNPARSEABLE),
        (r"\boxed{\frac}", "42", Verdict.UNPARSEABLE),
        (r"\boxed{" + "1+" * 600 + "1}", "601", Verdict.UNPARSEABLE),
        (r"\boxed{" + "(" * 30 + "42" + ")" * 30 + "}", "42", Verdict.UNPARSEABLE),
    ],
)
def test_grade(response: str, gold: str, verdict: Verdict) -> None:
    assert grade(response, gold) is verdict


@pytest.mark.parametrize(
    ("given", "gold", "verdict"),
    [
        ("200, 100", "100, 200", Verdict.CORRECT),
        ("153, 371, 370, 407", "153, 370, 371, 407", Verdict.CORRECT),
        ("(1, 200)", "(1,200)", Verdict.CORRECT),
        ("2400", "2, 400", Verdict.INCORRECT),
        ("1, 234", "1234", Verdict.INCORRECT),
        ("100,200", "100, 200", Verdict.CORRECT),
        ("100,200", "200, 100", Verdict.INCORRECT),
        ("1 2", "12", Verdict.INCORRECT),
        ("1 2", "3", Verdict.INCORRECT),
        (r"1\,2", "3", Verdict.INCORRECT),
        ("3", "1 2", Verdict.INCORRECT),
        ("1 2", "2, 1", Verdict.CORRECT),
        ("1 1/2", "11/2", Verdict.INCORRECT),
        ("1 1/2", "1/2", Verdict.INCORRECT),
        ("1 1/2", r"\frac{3}{2}", Verdict.CORRECT),
        (r"1\ 1/2", "1 1/2", Verdict.CORRECT),
        ("-1 1/2", r"-\frac{3}{2}", Verdict.CORRECT),
        (r"x = 1 1/2 \text{ cups}", "3/2", Verdict.CORRECT),
        (r"1\frac{1}{2}", "1 1/2", Verdict.CORRECT),
        (r"\log_2 1/2", "-1", Verdict.CORRECT),
        (r"\log_2 8", "3", Verdict.CORRECT),
        (r"\frac1 2", "0.5", Verdict.CORRECT),
    ],
    ids=str,
)
def test_spaces_between_numbers(given: str, gold: str, verdict: Verdict) -> None:
    assert grade(rf"\boxed{{{given}}}", gold) is verdict


@pytest.mark.parametrize(
    ("given", "gold", "verdict"),
    [
        ("0.00005", str(0.00005), Verdict.CORRECT),
        (r"5\cdot e-5", str(0.00005), Verdict.INCORRECT),
        ("5e-5", str(0.00005), Verdict.CORRECT),
        ("10000000000000000", str(1e16), Verdict.CORRECT),
        ("1e6", "1000000", Verdict.CORRECT),
        ("1.5e3", "1500", Verdict.CORRECT),
        ("-2E-3", "-0.002", Verdict.CORRECT),
        ("1.5e3", "1501", Verdict.INCORRECT),
        ("1e6", r"6 \cdot e", Verdict.INCORRECT),
        ("-1+2e", "2e-1", Verdict.CORRECT),
        ("2e - 1", "2e-1", Verdict.CORRECT),
        (r"10\,000", "10000", Verdict.CORRECT),
        (r"10\,000", "0", Verdict.INCORRECT),
        (r"1\,234\,567", "1234567", Verdict.CORRECT),
        (r"1\,234\,567", "802", Verdict.INCORRECT),
        ("10{,}000", "10000", Verdict.CORRECT),
        ("10~000", "10000", Verdict.CORRECT),
        (r"x = 10\ 000", "10000", Verdict.CORRECT),
        ("10 000 m", "10000", Verdict.CORRECT),
        ("10 000 m", "0", Verdict.INCORRECT),
        (r"3.141\,592", "3.141592", Verdict.CORRECT),
        (r"2^3\,100", "800", Verdict.CORRECT),
        ("42.", "42", Verdict.CORRECT),
        ("42", "42.", Verdict.CORRECT),
        ("x+1.", "1+x", Verdict.CORRECT),
        ("42.", "43", Verdict.INCORRECT),
    ],
    ids=str,
)
def test_notations_of_numbers(given: str, gold: str, verdict: Verdict) -> None:
    assert grade(rf"\boxed{{{given}}}", gold) is verdict


@pytest.mark.parametrize(
    ("given", "gold", "verdict"),
    [
        ("(\N{MINUS SIGN}\N{INFINITY}, 3)", r"(-\infty, 3)", Verdict.CORRECT),
        ("(\N{MINUS SIGN}\N{INFINITY}, 3)", "3", Verdict.INCORRECT),
        ("1 ? 42", "42", Verdict.UNPARSEABLE),
        ("# 42", "42", Verdict.UNPARSEABLE),
        ("41 \N{RIGHTWARDS ARROW} 42", "42", Verdict.UNPARSEABLE),
        ("> 42", "42", Verdict.UNPARSEABLE),
        ("1, 2, 3, ...", "3", Verdict.UNPARSEABLE),
        ("\N{ALMOST EQUAL TO} 42", "42", Verdict.CORRECT),
        (r"\approx 42", "42", Verdict.CORRECT),
        ("= 42", "42", Verdict.CORRECT),
        (r"=42\text{ cm}", "42", Verdict.CORRECT),
        (r"\bf 42", "42", Verdict.CORRECT),
        (r"\therefore x = 42", "42", Verdict.CORRECT),
        (r"\Rightarrow 42", "42", Verdict.CORRECT),
        ("=> 42", "42", Verdict.CORRECT),
        (r"\geq 42", "42", Verdict.UNPARSEABLE),
        ("12 apples", "12", Verdict.CORRECT),
        ("1/2", "0.5", Verdict.CORRECT),
        (r"50\%", "0.5", Verdict.CORRECT),
        (r"12\text{ km/h}", "12", Verdict.CORRECT),
        (r"\$12", "12", Verdict.CORRECT),
    ],
    ids=str,
)
def test_a_box_is_not_graded_by_its_last_number(given: str, gold: str, verdict: Verdict) -> None:
    assert grade(rf"\boxed{{{given}}}", gold) is verdict


@pytest.mark.parametrize(
    ("response", "gold", "verdict"),
    [
        (r"The answer is \$18.", "18", Verdict.CORRECT),
        (r"It costs \$ 18", "18", Verdict.CORRECT),
        (r"The answer is \$18.", "8", Verdict.INCORRECT),
        ("The final answer is:\n$$\n42\n$$", "42", Verdict.CORRECT),
        ("The answer is 42. I hope this answer is helpful!", "42", Verdict.CORRECT),
        ("One might think the answer is 42. But this answer is wrong.", "42", Verdict.UNPARSEABLE),
        ("The answer is 42. Wait, that answer is incorrect, I do not know.", "42", Verdict.UNPARSEABLE),
        ("The answer is 1 1/2.", "3/2", Verdict.CORRECT),
        ("The answer is 1 1/2.", "1/2", Verdict.INCORRECT),
        ("The answer is 5e-05.", "0.00005", Verdict.CORRECT),
        ("The answer is \N{MINUS SIGN}5.", "-5", Verdict.CORRECT),
        ("The answer is \N{MINUS SIGN}5.", "5", Verdict.INCORRECT),
    ],
    ids=str,
)
def test_answers_without_a_box(response: str, gold: str, verdict: Verdict) -> None:
    assert grade(response, gold) is verdict


@pytest.mark.parametrize(
    "character", ["1 ", "1,", r"1\,", "1 1/", "####", "answer is helpful ", "answer is $$", " ", "1~"]
)
def test_hostile_text_is_read_in_linear_time(character: str) -> None:
    text = character * (MAX_TEXT_CHARS // len(character))
    started = time.monotonic()
    extract_answer(Answer(text, text))
    settle(Extracted(text, "boxed"), "1, 2")
    assert time.monotonic() - started < 10.0


@pytest.mark.parametrize("gold", ["42", r"\frac{3}{4}", r"\text{east}", "1,2", r"x \in [-2,7]", "#### 7", "$3$"])
def test_good_gold_answers_pass_the_audit(gold: str) -> None:
    assert check_gold(gold) is None


@pytest.mark.parametrize("gold", ["", r"\frac", "(" * 40 + "1" + ")" * 40, "1+" * 600 + "1", "   "])
def test_bad_gold_answers_are_named(gold: str) -> None:
    assert check_gold(gold)


def test_numbers_without_sympy_agree_with_sympy() -> None:
    """Integers and fractions are compared exactly; math-verify must be of the same opinion."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    rng = random.Random(3)
    small = [str(rng.randrange(-9, 9)) for _ in range(6)]
    fractions = [rf"{rng.choice(['', '-'])}\frac{{{rng.randrange(20)}}}{{{rng.randrange(1, 9)}}}" for _ in range(8)]
    slashes = [
        "1/2",
        "-3/6",
        "4/2",
        "007",
        "-0",
        "0",
        "999999/999998",
        "999998/999997",
        "123456789012",
        "12,345",
        "12345",
        "1,000,000",
    ]
    numbers = [*small, *fractions, *slashes]
    settled = 0
    for given in numbers:
        for gold in rng.sample(numbers, 8):
            verdict, _ = settle(Extracted(given, "boxed"), gold)
            settled += verdict is not None
            assert (verdict is Verdict.CORRECT) == directly(rf"\boxed{{{given}}}", gold), (given, gold)
    assert settled == 8 * len(numbers)
    assert settle(Extracted("0.5", "boxed"), "1/2")[0] is None
    assert settle(Extracted("1/0", "boxed"), "2")[0] is None


def directly(response: str, gold: str) -> bool:
    """math-verify as its documentation says to call it, in the main process."""
    from math_verify import parse, verify

    return bool(verify(parse(rf"$\boxed{{{gold}}}$"), parse(response)))


def test_agrees_with_math_verify_called_directly() -> None:
    """Right and wrong answers to real questions, written in the ways models write them."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    golds = json.loads((Path(__file__).parent / "golden" / "gold_answers.json").read_text(encoding="utf-8"))
    rng = random.Random(0)
    wrappers = (
        r"So it is \boxed{%s}.",
        "The final answer is $%s$.",
        r"Thus $x$ holds and $\boxed{%s}$",
        r"\boxed{ %s }",
    )
    disagreements = []
    for i, gold in enumerate(golds):
        for given in (gold, rng.choice(golds)):
            response = wrappers[i % len(wrappers)] % given
            if (grade(response, gold) is Verdict.CORRECT) != directly(response, gold):
                disagreements.append((response, gold, grade(response, gold)))
    assert not disagreements
