"""`softgrpo grade`: grade existing responses through the same verifier as training.

    {id, response, gold, rule?}  --one JSON object per line-->  {id, verdict, reward, extracted, seconds[, detail]}

Input may also have `finish_reason` (stop | length) and `num_tokens`, which some rules look at. All lines are checked
before the first is graded, gold answers as those of training are; the output appears complete or not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from orchestration.config import ConfigError
from orchestration.user_rule import check_user_rule
from reward.audit import audit_gold, check_rules
from reward.extraction import Answer
from reward.rules import Gold, RuleError, parse_rule
from reward.verdict import Grade, Verdict
from reward.verifier import Verifier, VerifierSpec

DEFAULT_RULE = "math"
MAX_LISTED = 20
_BATCH_LINES = 1024
_KNOWN = frozenset({"id", "response", "gold", "rule", "finish_reason", "num_tokens"})
_END_OF_THINKING = "</think>"


class GradeInputError(ConfigError):
    """Lines that cannot be graded; the message names each with its file, number and fix."""


@dataclass(frozen=True, slots=True)
class GradeSummary:
    """What a file of responses came to."""

    num_graded: int
    verdicts: dict[Verdict, int]
    mean_reward: float
    seconds: float
    """Spent by grader children."""


@dataclass(frozen=True, slots=True)
class _Line:
    id: str | int
    answer: Answer
    gold: Gold
    rule: str


def grade_file(
    input_path: Path, output_path: Path, *, rule: str = DEFAULT_RULE, spec: VerifierSpec | None = None
) -> GradeSummary:
    """Grade every line of `input_path`; `rule` is for lines that name none.

    Raises `GradeInputError` if any line cannot be graded (none is graded then), or if a file cannot be read or written.
    """
    spec = spec or VerifierSpec()
    if input_path.resolve() == output_path.resolve():
        raise GradeInputError(f"{output_path}: input and output are the same file; give another --output")
    _check_input(input_path, rule, spec)
    partial = output_path.with_name(f".{output_path.name}.{os.getpid()}.partial")
    verifier = Verifier(spec)
    try:
        with partial.open("x", encoding="ascii") as output:
            summary = _grade_lines(_read_lines(input_path, rule, spec), verifier, output)
        partial.replace(output_path)
    except OSError as error:
        raise GradeInputError(f"{output_path}: cannot be written: {error.strerror}") from error
    finally:
        verifier.close()
        partial.unlink(missing_ok=True)
    return summary


def _grade_lines(lines: Iterator[_Line], verifier: Verifier, output: Any) -> GradeSummary:
    verdicts: Counter[Verdict] = Counter()
    reward = seconds = 0.0
    while batch := list(islice(lines, _BATCH_LINES)):
        grades = verifier.score(
            [line.answer for line in batch], [line.gold for line in batch], [line.rule for line in batch]
        )
        for line, grade in zip(batch, grades, strict=True):
            output.write(_format_grade(line.id, grade) + "\n")
        verdicts.update(grade.verdict for grade in grades)
        reward += sum(grade.reward for grade in grades)
        seconds += sum(grade.seconds for grade in grades)
    total = verdicts.total()
    return GradeSummary(total, {verdict: verdicts[verdict] for verdict in Verdict}, reward / total, seconds)


def _format_grade(identifier: str | int, grade: Grade) -> str:
    record = {
        "id": identifier,
        "verdict": grade.verdict.value,
        "reward": grade.reward,
        "extracted": grade.extracted,
        "seconds": round(grade.seconds, 6),
    }
    return json.dumps(record | ({"detail": grade.detail} if grade.detail else {}))


def _check_input(path: Path, rule: str, spec: VerifierSpec) -> None:
    """Read everything once, collecting what is wrong."""
    problems: list[tuple[int, str]] = []
    numbers: list[int] = []
    golds: list[Gold] = []
    rules: list[str] = []
    for number, text in _numbered_lines(path):
        try:
            line = _parse_line(text, rule, spec)
        except (ValueError, RecursionError) as error:
            problems.append((number, str(error)))
            continue
        numbers.append(number)
        golds.append(line.gold)
        rules.append(line.rule)
    if not numbers and not problems:
        raise GradeInputError(f"{path}: holds no lines; give one JSON object with id, response and gold per line")
    if spec.user_rule and any(term.name == "user" for used in set(rules) for term in parse_rule(used)):
        check_user_rule(spec.user_rule)
    for number, gold, used, reason in zip(numbers, golds, rules, audit_gold(golds, rules, spec), strict=True):
        if reason is not None:
            problems.append((number, f"gold={gold!r:.80}: {reason} (rule {used}); correct it, or leave the line out"))
    if problems:
        listed = [f"{path}:{number}: {problem}" for number, problem in sorted(problems)[:MAX_LISTED]]
        more = f"\n... and {len(problems) - MAX_LISTED} more lines" if len(problems) > MAX_LISTED else ""
        raise GradeInputError("\n".join(listed) + more)


def _read_lines(path: Path, rule: str, spec: VerifierSpec) -> Iterator[_Line]:
    return (_parse_line(text, rule, spec) for _, text in _numbered_lines(path))


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, from 1."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, text
    except FileNotFoundError:
        raise GradeInputError(f"{path}: no such file; give --input a JSONL file") from None
    except UnicodeDecodeError as error:
        raise GradeInputError(f"{path}: not UTF-8 text: {error}") from None
    except OSError as error:
        raise GradeInputError(f"{path}: cannot be read: {error.strerror}") from None


def _parse_line(text: str, default_rule: str, spec: VerifierSpec) -> _Line:
    """Raises ValueError with what is wrong and the fix."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with id, response and gold, found {type(record).__name__}")
    missing = [key for key in ("id", "response", "gold") if key not in record]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; fields: {', '.join(sorted(record)) or 'none'}")
    if unknown := sorted(set(record) - _KNOWN):
        raise ValueError(f"unknown field {', '.join(unknown)}; known: {', '.join(sorted(_KNOWN))}")
    identifier, response, gold = record["id"], record["response"], record["gold"]
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise ValueError(f"id={identifier!r:.80}: expected a string or a whole number")
    if not isinstance(response, str):
        raise ValueError(f"response={response!r:.80}: expected a string")
    rule = record.get("rule") or default_rule
    if not isinstance(rule, str):
        raise ValueError(f"rule={rule!r:.80}: expected a text such as 'math + 0.1*format'")
    check_rules([rule], user_rule=spec.user_rule)
    answer = _answer(record, response)
    if answer.num_tokens is None and any(term.name == "length" for term in parse_rule(rule)):
        raise ValueError(f"num_tokens missing: the rule {rule} looks at the length of the response")
    return _Line(identifier, answer, _gold(gold), rule)


def _gold(gold: Any) -> Gold:
    if isinstance(gold, bool) or not isinstance(gold, str | int | float | dict) or gold == "":
        raise ValueError(f"gold={gold!r:.80}: expected a text, a number or an object with tests")
    return gold if isinstance(gold, dict) else str(gold)


def _answer(record: dict[str, Any], response: str) -> Answer:
    finish_reason = record.get("finish_reason", "stop")
    if finish_reason not in ("stop", "length"):
        raise ValueError(f"finish_reason={finish_reason!r:.80}: expected stop or length")
    num_tokens = record.get("num_tokens")
    if num_tokens is not None and (isinstance(num_tokens, bool) or not isinstance(num_tokens, int)):
        raise ValueError(f"num_tokens={num_tokens!r:.80}: expected a whole number")
    _, ended, after = response.rpartition(_END_OF_THINKING)
    return Answer(response, after if ended else "", finish_reason, num_tokens)


def main(arguments: Sequence[str]) -> int:
    """`softgrpo grade`: prints the counts; 0 done, 2 if the input cannot be graded."""
    parser = argparse.ArgumentParser(
        prog="softgrpo grade", description="Grade responses: {id, response, gold, rule?} in, {id, verdict, ...} out."
    )
    defaults = VerifierSpec()
    parser.add_argument("--input", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--rule", default=DEFAULT_RULE, help="for lines that name none, e.g. 'math + 0.1*format'")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="grader children (default: cores)")
    parser.add_argument("--deadline-s", type=float, default=defaults.deadline_s, help="per answer (default 5)")
    parser.add_argument("--memory-mb", type=int, default=defaults.memory_mb, help="per child (default 2048)")
    parser.add_argument("--user-rule", metavar="MODULE:FUNCTION", help="what the rule `user` calls")
    given = parser.parse_args(arguments)
    for name in ("processes", "deadline_s", "memory_mb"):
        if not 0 < getattr(given, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a positive number")
    spec = VerifierSpec(given.processes, given.deadline_s, given.memory_mb, given.user_rule)
    try:
        check_rules([given.rule], user_rule=spec.user_rule)
    except RuleError as error:
        parser.error(f"--rule: {error}")
    summary = grade_file(given.input, given.output, rule=given.rule, spec=spec)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in summary.verdicts.items() if count)
    sys.stdout.write(f"{summary.num_graded} graded: {counts}; mean reward {summary.mean_reward:.4f}\n")
    return 0
