"""Reward rules: one function each, chosen per data source, combinable with weights.

    math                     one rule
    math + 0.1*format        a weighted sum; the verdict is the first rule's, unless another rule failed
    numeric(0.01)            with arguments
    math + length(6144, 8192)

A rule looks at an answer and a gold value and either settles the matter in linear time, or returns a `Task` for the
sandbox: mathematics, programs and users' own functions never run in the verifier's process.
"""

from __future__ import annotations

import functools
import math as numbers
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from reward.choice import choice_letter, letter_in
from reward.code_tests import MAX_PROGRAM_CHARS, TestsError, check_tests, extract_program
from reward.extraction import MAX_TEXT_CHARS, Answer, extract_answer, refuse_oversized
from reward.math import expression, gold_expression, gold_text, settle
from reward.notation import readable, tight
from reward.string_match import string_match
from reward.verdict import Verdict
from reward.wire import Message

Gold = str | dict[str, Any]


class RuleError(ValueError):
    """A rule expression, or a gold value, that cannot be used; the message names the fix."""


@dataclass(frozen=True, slots=True)
class Score:
    """What one rule says."""

    verdict: Verdict
    reward: float
    extracted: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """Work for a sandbox child."""

    payload: Message
    extracted: str | None
    key: Hashable | None = None
    """Answers with the same key have the same verdict; None is never cached."""
    confined: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule and what it needs."""

    apply: Callable[[Answer, Gold, tuple[float, ...]], Score | Task]
    check_gold: Callable[[Gold], str | Task | None]
    """Why a gold value cannot be used, None if it can, or a task that finds out."""
    num_arguments: tuple[int, ...] = (0,)
    """How many arguments it may have."""


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a rule expression."""

    name: str
    weight: float = 1.0
    arguments: tuple[float, ...] = ()


def math(answer: Answer, gold: Gold, _: tuple[float, ...]) -> Score | Task:
    """1 where math-verify finds the final answer equal to the gold one."""
    text = _text(gold)
    extracted = extract_answer(answer)
    shown = extracted.text if extracted else None
    verdict, detail = settle(extracted, text)
    if verdict is not None or extracted is None:
        return _score(verdict or Verdict.UNPARSEABLE, shown, detail)
    given, wanted = expression(extracted), gold_expression(text)
    return Task({"task": "math", "answer": given, "gold": wanted}, shown, ("math", given, wanted))


def math_string(answer: Answer, gold: Gold, _: tuple[float, ...]) -> Score:
    """The reference's string rule: last box anywhere in the response, thinking included."""
    equal, extracted = string_match(answer.response_text, _text(gold))
    if extracted is None:
        return _score(Verdict.UNPARSEABLE, None, "no boxed answer")
    return _score(Verdict.CORRECT if equal else Verdict.INCORRECT, extracted)


def choice(answer: Answer, gold: Gold, _: tuple[float, ...]) -> Score:
    """1 for the right letter of a multiple-choice question (GPQA style)."""
    letter = choice_letter(answer)
    if letter is None:
        return _score(Verdict.UNPARSEABLE, None, "no letter chosen")
    return _score(Verdict.CORRECT if letter == letter_in(_text(gold)) else Verdict.INCORRECT, letter)


def exact(answer: Answer, gold: Gold, _: tuple[float, ...]) -> Score:
    """1 where the final answer, or the whole text, is the gold string; runs of white space count as one space."""
    extracted = extract_answer(answer)
    wanted = " ".join(_text(gold).split())
    candidates = [extracted.text] if extracted else []
    candidates.append(answer.final_text[-MAX_TEXT_CHARS:])
    if any(" ".join(candidate.split()) == wanted for candidate in candidates):
        return _score(Verdict.CORRECT, candidates[0])
    return _score(Verdict.INCORRECT if extracted else Verdict.UNPARSEABLE, extracted.text if extracted else None)


def numeric(answer: Answer, gold: Gold, arguments: tuple[float, ...]) -> Score:
    """1 where the final number is within a tolerance of the gold one, relative to max(1, |gold|): numeric(0.01)."""
    tolerance = arguments[0] if arguments else 1e-6
    extracted = extract_answer(answer)
    if extracted is None:
        return _score(Verdict.UNPARSEABLE, None, "no boxed or final answer")
    value, wanted = _number(extracted.text), _number(gold_text(_text(gold)))
    if wanted is None:
        raise RuleError(f"the gold answer {gold!r} is not a number")
    if value is None:
        return _score(Verdict.UNPARSEABLE, extracted.text, "not a number")
    close = abs(value - wanted) <= tolerance * max(1.0, abs(wanted))
    return _score(Verdict.CORRECT if close else Verdict.INCORRECT, extracted.text)


def format(answer: Answer, _: Gold, __: tuple[float, ...]) -> Score:
    """1 for one closed thinking block followed by exactly one boxed answer, in a response that ended by itself."""
    problems = []
    before, closed, after = answer.response_text[-MAX_TEXT_CHARS:].rpartition("</think>")
    final = answer.answer_text or (after if closed else "")
    if not final.strip():
        problems.append("thinking was not closed")
    if before.count("</think>") or before.count("<think>") > 1 or "<think>" in final or "</think>" in final:
        problems.append("more than one thinking block")
    boxes = len(re.findall(r"\\boxed(?![A-Za-z])", final))
    if boxes != 1:
        problems.append(f"{boxes} boxed answers after the thinking")
    if answer.finish_reason == "length":
        problems.append("cut off by the length limit")
    return _score(Verdict.INCORRECT if problems else Verdict.CORRECT, None, "; ".join(problems))


def length(answer: Answer, _: Gold, arguments: tuple[float, ...]) -> Score:
    """Over-length penalty: 0 up to `start` tokens, then linear down to -1 at `limit`: length(start, limit)."""
    start, limit = arguments
    if answer.num_tokens is None:
        raise RuleError("the length rule needs the number of tokens of a response, and only its text is known")
    penalty = min(1.0, max(0.0, (answer.num_tokens - start) / (limit - start)))
    return Score(Verdict.CORRECT, -penalty if penalty else 0.0, None, f"{answer.num_tokens} tokens")


def code(answer: Answer, gold: Gold, _: tuple[float, ...]) -> Score | Task:
    """1 where the program in the answer (its last fenced block) passes all tests of the gold value."""
    program = extract_program(answer.final_text[-MAX_TEXT_CHARS:])
    if program is None:
        return _score(Verdict.UNPARSEABLE, None, "no program")
    if len(program) > MAX_PROGRAM_CHARS:
        detail = f"the program has {len(program)} characters, the limit is {MAX_PROGRAM_CHARS}"
        return _score(Verdict.UNPARSEABLE, None, detail)
    return Task({"task": "code", "program": program, "gold": gold}, program, confined=True)


def user(answer: Answer, gold: Gold, _: tuple[float, ...]) -> Task:
    """The configured `module:function`, called with (Answer, gold) in a child; its number is the reward."""
    shown = {
        "response_text": answer.response_text[-MAX_TEXT_CHARS:],
        "answer_text": answer.answer_text[-MAX_TEXT_CHARS:],
        "finish_reason": answer.finish_reason,
        "num_tokens": answer.num_tokens,
    }
    return Task({"task": "user", "answer": shown, "gold": gold}, None)


def _check_math(gold: Gold) -> str | Task | None:
    return Task({"task": "check_gold", "gold": _text(gold)}, None)


def _check_choice(gold: Gold) -> str | None:
    return None if letter_in(_text(gold)) else f"{gold!r} is not a letter of a multiple-choice question"


def _check_text(gold: Gold) -> str | None:
    return None if _text(gold).strip() else "empty"


def _check_number(gold: Gold) -> str | None:
    return None if _number(gold_text(_text(gold))) is not None else f"{gold!r} is not a number"


def _check_code(gold: Gold) -> str | None:
    try:
        check_tests(gold)
    except TestsError as error:
        return str(error)
    return None


def _check_nothing(_: Gold) -> None:
    return None


RULES: dict[str, Rule] = {
    "math": Rule(math, _check_math),
    "math_string": Rule(math_string, _check_text),
    "choice": Rule(choice, _check_choice),
    "exact": Rule(exact, _check_text),
    "numeric": Rule(numeric, _check_number, (0, 1)),
    "format": Rule(format, _check_nothing),
    "length": Rule(length, _check_nothing, (2,)),
    "code": Rule(code, _check_code),
    "user": Rule(user, _check_nothing),
}

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_TERM = re.compile(rf"(?:({_NUMBER})\s*\*\s*)?([A-Za-z_]+)\s*(?:\(([^()]*)\))?", re.IGNORECASE)


@functools.lru_cache(maxsize=256)
def parse_rule(text: str) -> tuple[Term, ...]:
    """The terms of a rule expression. Raises `RuleError` with the position and the known rules."""
    terms: list[Term] = []
    for part in _split_terms(text):
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise RuleError(f"rule {text!r}: cannot read {part.strip()!r}; write e.g. math + 0.1*format")
        weight, name, arguments = match.groups()
        if name not in RULES:
            raise RuleError(f"rule {text!r}: unknown rule {name!r}; known: {', '.join(RULES)}")
        terms.append(Term(name, float(weight or 1.0), _arguments(text, name, arguments)))
    return tuple(terms)


def _split_terms(text: str) -> list[str]:
    """Split at plus signs outside parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _arguments(text: str, name: str, listed: str | None) -> tuple[float, ...]:
    given = [part.strip() for part in (listed or "").split(",") if part.strip()]
    try:
        values = tuple(float(part) for part in given)
    except ValueError:
        raise RuleError(f"rule {text!r}: the arguments of {name} are numbers, found {listed!r}") from None
    allowed = RULES[name].num_arguments
    if len(values) not in allowed:
        wanted = " or ".join(str(number) for number in allowed)
        raise RuleError(f"rule {text!r}: {name} takes {wanted} arguments, found {len(values)}")
    if name == "length" and not 0 <= values[0] < values[1]:
        raise RuleError(f"rule {text!r}: length(start, limit) needs 0 <= start < limit")
    if name == "numeric" and values and values[0] < 0:
        raise RuleError(f"rule {text!r}: the tolerance of numeric must not be negative")
    return values


def _score(verdict: Verdict, extracted: str | None, detail: str = "") -> Score:
    return Score(verdict, 1.0 if verdict is Verdict.CORRECT else 0.0, extracted, detail)


def _text(gold: Gold) -> str:
    if isinstance(gold, dict):
        raise RuleError(f"this rule needs a text as gold answer, not an object with keys {sorted(gold)}")
    return str(gold)


_FRACTION = re.compile(r"([-+]?)(\d{0,9})\\[dt]?frac\{([-+]?[\d.]{1,40})\}\{([-+]?[\d.]{1,40})\}")
_GROUPED = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?:\.[0-9]*)?")


def _number(text: str) -> float | None:
    """A decimal, a percentage as it stands, a/b, a mixed number; separators of thousands and units of currency go."""
    if refuse_oversized(text):
        return None
    plain = tight(re.sub(r"\\[,;]", " ", re.sub(r"[$€£%]|\\[$%!]", "", readable(text))))
    match = _FRACTION.fullmatch(plain)
    sign, whole, top, bottom = match.groups() if match else ("", "", *_halves(plain))
    try:
        value = float(whole or 0) + _decimal(top) / _decimal(bottom)
    except (ValueError, ZeroDivisionError):
        return None
    return (-value if sign == "-" else value) if numbers.isfinite(value) else None


def _halves(text: str) -> tuple[str, str]:
    top, slash, bottom = text.partition("/")
    return top, bottom if slash else "1"


def _decimal(text: str) -> float:
    """`float`, but commas separate thousands and underscores nothing."""
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    return float(text.replace("_", "?"))
