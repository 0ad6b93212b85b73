r"""Mathematical answers: extraction, caps, exact string, then math-verify.

math-verify's own time limit is a SIGALRM that a C-level big-integer power ignores and that raises off the main
thread, so it is switched off: whoever calls `compare` owns the deadline (`reward.sandbox` kills the process).

    response --extract_answer--> same string or number? --> caps --> compare: parse both, verify

Several boxes in one response are not read together (math-verify would make {4, 5} of a 4 corrected to a 5): the last
one is the answer.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import Any

from reward.extraction import Answer, Extracted, extract_answer, last_boxed, refuse_oversized
from reward.notation import mixed_number, plain, readable, scientific, tight
from reward.verdict import Verdict

_EXACT_NUMBER = re.compile(
    r"-?[0-9]{1,12}|-?[0-9]{1,3}(?:,[0-9]{3}){1,3}|(?P<sign>-?)(?:\\[dt]?frac\{(?P<a>[0-9]{1,6})\}\{(?P<b>[0-9]{1,6})\}|(?P<c>[0-9]{1,6})/(?P<d>[0-9]{1,6}))"
)
"""Integers and plain fractions, small enough that math-verify's 15 digits tell any two apart."""
_EULER = re.compile(r"[-+]?[0-9]+e[-+][0-9]")
_DOLLARS = re.compile(r"\\\$(?=\s?[0-9])")
"""The sign of the currency; math-verify reads a number after it in LaTeX alone."""
_BOX_START = r"\boxed{"


def grade(answer: str, gold: str) -> Verdict:
    """Compare a response with a gold answer in this process, without any time limit (the sandbox supplies it)."""
    extracted = extract_answer(Answer(answer, answer))
    settled, _ = settle(extracted, gold)
    if settled is not None or extracted is None:
        return settled or Verdict.UNPARSEABLE
    return compare(expression(extracted), gold_expression(gold))


def settle(extracted: Extracted | None, gold: str) -> tuple[Verdict | None, str]:
    """The verdict where no mathematics is needed (None otherwise), and why; linear time, safe in any process."""
    if extracted is None:
        return Verdict.UNPARSEABLE, "no boxed or final answer"
    given, wanted = tight(readable(extracted.text)), tight(readable(gold_text(gold)))
    if given.replace(", ", ",") == wanted.replace(", ", ","):  # the comma says enough where both have it
        return Verdict.CORRECT, ""
    value, wanted_value = _exact_number(given), _exact_number(wanted)
    if value is not None and wanted_value is not None:
        return Verdict.CORRECT if value == wanted_value else Verdict.INCORRECT, ""
    refusal = refuse_oversized(extracted.text)
    return (Verdict.UNPARSEABLE, refusal) if refusal else (None, "")


def compare(answer: str, gold: str) -> Verdict:
    """math-verify's opinion of two expressions (see `expression`); no time limit.

    Raises MemoryError where the limit of the process was met, `GoldError` where the gold answer does not parse.
    """
    from math_verify import verify

    golds = _parse_gold(gold)
    if not golds:
        raise GoldError(f"the gold answer {gold!r} cannot be parsed")
    answers = _parse(answer)
    if not answers:
        return Verdict.UNPARSEABLE
    if verify(list(golds), answers, timeout_seconds=None):
        return Verdict.CORRECT
    return Verdict.UNPARSEABLE if all(isinstance(parsed, str) for parsed in answers) else Verdict.INCORRECT


_UNLIKELY = r"\boxed{-7919.625}"
"""An answer that no question has: a gold value for which the comparison takes for ever is found with it."""


class GoldError(ValueError):
    """A gold answer that no response can match."""


def check_gold(gold: str) -> str | None:
    """Why this gold answer cannot be verified: it does not parse, or it does not equal itself; None if it is fine.

    No time limit, like `compare`.
    """
    from math_verify import verify

    text = gold_text(gold)
    if not text:
        return "empty"
    refusal = refuse_oversized(text)
    if refusal:
        return refusal.replace("the extracted answer", "the gold answer")
    parsed = _parse_gold(gold_expression(gold))
    if all(isinstance(value, str) for value in parsed):
        return f"{text!r} cannot be parsed as mathematics"
    if not verify(list(parsed), _parse(gold_expression(gold)), timeout_seconds=None):
        return f"{text!r} does not equal itself"
    if verify(list(parsed), _parse(_UNLIKELY), timeout_seconds=None):
        return f"{text!r} equals an arbitrary number"
    return None


def expression(extracted: Extracted) -> str:
    """What math-verify is given: a box around what was marked, its own extraction for the rest."""
    text = plain(extracted.text)
    number = scientific(text) or mixed_number(text)
    if extracted.source == "boxed" or number:
        return _box(number or readable(text))
    text = _DOLLARS.sub("", text)
    return f"The final answer is: {text}" if extracted.source == "phrase" else text


def gold_text(gold: str) -> str:
    """The answer inside a gold string: in its box, after `####` (GSM8K), between dollar signs, or all of it."""
    boxed = last_boxed(gold)
    if boxed is not None:
        return boxed
    text = gold.rsplit("####", 1)[-1].strip()
    while len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text.strip("$"):
        text = text[1:-1].strip()
    return text


def gold_expression(gold: str) -> str:
    """A gold string as math-verify is given it.

    `2e-1` stays a multiple of Euler's number: a float of a data set is written with two digits, `2e-01`.
    """
    text = readable(gold_text(gold))
    return _box(text if _EULER.fullmatch(text) else scientific(text) or text)


def _box(text: str) -> str:
    return f"{_BOX_START}{text}}}"


def _exact_number(text: str) -> Fraction | None:
    """The value of an integer or a plain fraction; None for everything else, decimals included (they are rounded)."""
    match = _EXACT_NUMBER.fullmatch(text)
    if match is None:
        return None
    numerator, denominator = match["a"] or match["c"], match["b"] or match["d"]
    if numerator is None:
        return Fraction(int(text.replace(",", "")))
    if int(denominator) == 0:
        return None
    value = Fraction(int(numerator), int(denominator))
    return -value if match["sign"] else value


@functools.lru_cache(maxsize=1024)
def _parse_gold(expression: str) -> tuple[Any, ...]:
    return tuple(_parse(expression))


def _parse(expression: str) -> list[Any]:
    """math-verify's reading of an expression: SymPy objects, then the string they came from.

    Its parser swallows every exception and keeps the string. A MemoryError must not look like bad LaTeX, so an
    expression that left only a string is parsed again without the net.

    A box is LaTeX and nothing else: where it is not, math-verify's other reading takes the last number inside.
    """
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import parse_latex_cached

    if expression.startswith(_BOX_START):
        parsed = parse(expression, [LatexExtractionConfig()], parsing_timeout=None)
    else:
        parsed = parse(expression, parsing_timeout=None)
    if len(parsed) == 1 and isinstance(parsed[0], str):
        try:
            parse_latex_cached(parsed[0])
        except MemoryError:
            raise
        except Exception:  # any way in which the grammar or SymPy refuses text: the answer is unparseable
            return list(parsed)
    return list(parsed)
