"""The demo's synthetic task: add n digits modulo M, thinking in running residues.

    question  "3 1 4 0 2 ="           answer  "\\boxed{0}"
    traces    S4330</think>\\boxed{0}   step by step          (right, unless a residue slips)
              D</think>\\boxed{2}       guessed directly      (mostly wrong)

The traces of the warm start are imperfect on purpose: most guess, so the model samples a right answer in less than half
of its attempts and knows a way that is nearly always right. Reinforcement learning has to find that out. Train and
held-out questions are disjoint by a hash of the question; everything is a function of the seed.

Source: the running-residue task of a plain-torch testbed; a second strategy from right to left made the warm start four
times as long (the operand's distance changes at every step) and showed nothing more.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STRATEGIES = ("D", "S")
END_OF_THINKING = "</think>"
HELD_OUT_SHARE = 10
"""One question in this many is held out."""


@dataclass(frozen=True, slots=True)
class ChainTask:
    """Sums of `num_digits` digits modulo `modulus`."""

    num_digits: int = 5
    modulus: int = 5

    def __post_init__(self) -> None:
        if not (2 <= self.modulus <= 10 and self.num_digits >= 2):
            raise ValueError(f"a chain needs at least 2 digits and a modulus from 2 to 10, not {self}")

    @property
    def max_response_tokens(self) -> int:
        """Longest trace: strategy, residues, end of thinking, box of three tokens, end of text."""
        return 1 + (self.num_digits - 1) + 1 + 3 + 1

    def questions(self, *, held_out: bool) -> list[tuple[int, ...]]:
        """All questions of one side of the split, in lexicographic order."""
        every = itertools.product(range(self.modulus), repeat=self.num_digits)
        return [digits for digits in every if is_held_out(digits) == held_out]

    def answer(self, digits: Sequence[int]) -> int:
        """The gold answer."""
        return sum(digits) % self.modulus


@dataclass(frozen=True, slots=True)
class TraceMixture:
    """How the warm start's traces are made."""

    direct_share: float
    """Traces that guess at once; the rest go step by step."""
    direct_accuracy: float = 0.1
    """Guesses that are right on purpose; the rest are uniform (and right by chance)."""
    slip_probability: float = 0.02
    """Residues replaced by a random one; the chain goes on from there."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One imperfect example of an answer."""

    question: str
    response: str
    """From the first thinking token up to the box; the end-of-text token is the tokenizer's business."""
    num_residues: int
    """Thinking tokens that are running residues (they follow the strategy letter); 0 for a guess."""


def is_held_out(digits: Sequence[int]) -> bool:
    """The side of the split, by a hash of the question: no seed, no order, no size changes it."""
    digest = hashlib.blake2b(question_text(digits).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def question_text(digits: Sequence[int]) -> str:
    """The user message."""
    return " ".join(map(str, digits)) + " ="


def traces(task: ChainTask, mixture: TraceMixture, seed: int, *, held_out: bool = False) -> Iterator[Trace]:
    """Endless imperfect traces of questions drawn with replacement from one side of the split."""
    rng = random.Random(seed)
    questions = task.questions(held_out=held_out)
    while True:
        yield _trace(task, mixture, rng.choice(questions), rng)


def _trace(task: ChainTask, mixture: TraceMixture, digits: tuple[int, ...], rng: random.Random) -> Trace:
    residues: list[int] = []
    if rng.random() < mixture.direct_share:
        strategy = "D"
        sure = rng.random() < mixture.direct_accuracy
        result = task.answer(digits) if sure else rng.randrange(task.modulus)
    else:
        strategy = "S"
        result, *rest = digits
        for digit in rest:
            slipped = rng.random() < mixture.slip_probability
            result = rng.randrange(task.modulus) if slipped else (result + digit) % task.modulus
            residues.append(result)
    thinking = strategy + "".join(map(str, residues))
    return Trace(question_text(digits), f"{thinking}{END_OF_THINKING}\\boxed{{{result}}}", len(residues))


def write_questions(task: ChainTask, directory: Path, *, num_evaluation: int) -> tuple[Path, Path]:
    """Write `train.jsonl` (every training question) and `held_out.jsonl` as {question, answer} rows.

    Evaluation questions are taken in the order of another hash: fewer of them are a prefix of more.
    """
    held_out = sorted(task.questions(held_out=True), key=lambda digits: hashlib.blake2b(bytes(digits)).digest())
    if num_evaluation > len(held_out):
        raise ValueError(f"{num_evaluation} evaluation questions wanted, {len(held_out)} are held out")
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "held_out.jsonl"
    for path, questions in zip(paths, (task.questions(held_out=False), held_out[:num_evaluation]), strict=True):
        rows = ({"question": question_text(q), "answer": f"\\boxed{{{task.answer(q)}}}"} for q in questions)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def write_traces(path: Path, examples: Sequence[Trace]) -> None:
    """Write supervised pairs as {prompt, response} rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"prompt": example.question, "response": example.response}) for example in examples)
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
