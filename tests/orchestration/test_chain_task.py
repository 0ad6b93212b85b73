"""The chain task: right answers, a clean split, traces with the promised imperfections."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from orchestration.chain_task import (
    ChainTask,
    Trace,
    TraceMixture,
    is_held_out,
    question_text,
    traces,
    write_questions,
    write_traces,
)
from orchestration.config_sections import DatasetConfig, RewardConfig
from orchestration.dataset import read_rows
from reward.math import grade
from reward.verdict import Verdict

TASK = ChainTask()
RESPONSE = re.compile(r"([DS])(\d*)</think>\\boxed\{(\d)\}")


def sample(mixture: TraceMixture, number: int, seed: int = 0, *, held_out: bool = False) -> list[Trace]:
    return list(itertools.islice(traces(TASK, mixture, seed, held_out=held_out), number))


def digits_of(trace: Trace) -> list[int]:
    return [int(text) for text in trace.question.removesuffix(" =").split()]


def test_split_is_disjoint_covers_everything_and_holds_a_tenth_out() -> None:
    train, held_out = set(TASK.questions(held_out=False)), set(TASK.questions(held_out=True))
    assert not train & held_out
    assert len(train | held_out) == 5**5
    assert 0.07 < len(held_out) / 5**5 < 0.13
    assert question_text((3, 1, 4, 0, 2)) == "3 1 4 0 2 ="


def test_written_questions_read_as_an_ordinary_dataset(tmp_path: Path) -> None:
    train, held_out = write_questions(TASK, tmp_path, num_evaluation=32)
    rows, problems = read_rows(DatasetConfig(path=str(train)), RewardConfig())
    assert not problems
    assert len(rows) == len({row.prompt_id for row in rows}) == len(TASK.questions(held_out=False))
    evaluation, _ = read_rows(DatasetConfig(path=str(held_out)), RewardConfig())
    assert len(evaluation) == 32
    for row in evaluation:
        digits = [int(text) for text in row.messages[0]["content"].removesuffix(" =").split()]
        assert is_held_out(digits)
        assert grade(f"D</think>\\boxed{{{sum(digits) % 5}}}", str(row.gold)) is Verdict.CORRECT
        assert grade(f"D</think>\\boxed{{{(sum(digits) + 1) % 5}}}", str(row.gold)) is Verdict.INCORRECT


def test_fewer_evaluation_questions_are_a_prefix_of_more(tmp_path: Path) -> None:
    _, few = write_questions(TASK, tmp_path / "few", num_evaluation=10)
    _, more = write_questions(TASK, tmp_path / "more", num_evaluation=20)
    assert more.read_text().startswith(few.read_text())
    with pytest.raises(ValueError, match="are held out"):
        write_questions(TASK, tmp_path, num_evaluation=10_000)


def test_careful_traces_without_slips_are_right_step_by_step() -> None:
    for trace in sample(TraceMixture(direct_share=0.0, slip_probability=0.0), 50):
        strategy, residues, answer = RESPONSE.fullmatch(trace.response).groups()  # type: ignore[union-attr]
        digits = digits_of(trace)
        assert strategy == "S"
        assert trace.num_residues == len(residues) == 4
        assert [int(r) for r in residues] == [sum(digits[: i + 2]) % 5 for i in range(4)]
        assert int(answer) == sum(digits) % 5


def test_mixture_has_the_promised_shares() -> None:
    examples = sample(TraceMixture(direct_share=0.75), 4000)
    parsed = [RESPONSE.fullmatch(trace.response).groups() for trace in examples]  # type: ignore[union-attr]
    right = [int(answer) == sum(digits_of(t)) % 5 for t, (_, _, answer) in zip(examples, parsed, strict=True)]
    direct = [strategy == "D" for strategy, _, _ in parsed]
    assert sum(direct) / 4000 == pytest.approx(0.75, abs=0.03)
    guesses = [r for r, d in zip(right, direct, strict=True) if d]
    careful = [r for r, d in zip(right, direct, strict=True) if not d]
    assert sum(guesses) / len(guesses) == pytest.approx(0.1 + 0.9 / 5, abs=0.03)
    assert sum(careful) / len(careful) == pytest.approx(0.94, abs=0.03)


def test_traces_depend_on_the_seed_and_respect_the_split() -> None:
    mixture = TraceMixture(direct_share=0.5)
    assert sample(mixture, 20, seed=1) == sample(mixture, 20, seed=1) != sample(mixture, 20, seed=2)
    assert not any(is_held_out(digits_of(trace)) for trace in sample(mixture, 200))
    assert all(is_held_out(digits_of(trace)) for trace in sample(mixture, 200, held_out=True))


def test_supervised_pairs_as_a_file(tmp_path: Path) -> None:
    examples = sample(TraceMixture(direct_share=0.5), 3)
    write_traces(tmp_path / "new" / "traces.jsonl", examples)
    lines = [json.loads(line) for line in (tmp_path / "new" / "traces.jsonl").read_text().splitlines()]
    assert lines == [{"prompt": trace.question, "response": trace.response} for trace in examples]


@pytest.mark.parametrize(("num_digits", "modulus"), [(1, 5), (5, 1), (5, 11)])
def test_impossible_tasks_are_refused(num_digits: int, modulus: int) -> None:
    with pytest.raises(ValueError, match="a chain needs"):
        ChainTask(num_digits, modulus)
