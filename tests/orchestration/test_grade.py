from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli import main
from orchestration.config import ConfigError
from orchestration.grade import GradeInputError, grade_file
from reward.verdict import Verdict
from reward.verifier import VerifierSpec

SPEC = VerifierSpec(2, 1.0, 512)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def row(identifier: Any, response: str, gold: Any = "42", **more: Any) -> dict[str, Any]:
    return {"id": identifier, "response": response, "gold": gold, **more}


def test_grades_come_back_in_order(tmp_path: Path) -> None:
    rows = [
        row("a", r"<think>no \boxed{1}</think>so \boxed{6\cdot 7}"),
        row("b", r"\boxed{41}"),
        row("tower", r"\boxed{9^{9^{9^9}}}"),
        row(4, "The answer is (C).", "C", rule="choice"),
        row("e", "nothing here " * 40),
        row("f", r"\boxed{4}", 4, rule="math + length(10, 20)", num_tokens=15),
        row("code", "```python\ndef f(): return 1\n```", {"test_list": ["assert f() == 1"]}, rule="code"),
        row("no gold needed", r"<think>t</think>\boxed{4}", {"tests": 0}, rule="format"),
    ]
    source, target = write(tmp_path / "in.jsonl", [*rows[:3], "", *rows[3:]]), tmp_path / "out.jsonl"
    summary = grade_file(source, target, spec=SPEC)
    graded = [json.loads(line) for line in target.read_text().splitlines()]
    assert [grade["id"] for grade in graded] == [given["id"] for given in rows]
    verdicts = ["correct", "incorrect", "timeout", "correct", "unparseable", "correct", "correct", "correct"]
    assert [grade["verdict"] for grade in graded] == verdicts
    assert graded[0]["extracted"] == r"6\cdot 7" and graded[5]["reward"] == 0.5
    assert graded[2]["seconds"] >= 1.0 and "killed" in graded[2]["detail"]
    assert summary.num_graded == 8 and summary.verdicts[Verdict.CORRECT] == 5
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no lines"),
        (["{"], ":1: not JSON"),
        (["[1]"], ":1: expected an object"),
        ([row(1, "x"), {"id": 2}], ":2: response, gold missing"),
        ([row(1, "x", None)], ":1: gold=None"),
        ([row(1, "x", "")], ":1: gold=''"),
        ([row(None, "x")], ":1: id=None"),
        ([row(1, "x", extra=1)], "unknown field extra"),
        ([{"id": 1, "response": 5, "gold": "1"}], "response=5"),
        ([row(1, "x", rule="maths")], "unknown rule 'maths'"),
        ([row(1, "x", rule="user")], "reward.user_rule"),
        ([row(1, "x", rule=5)], ":1: rule=5: expected a text"),
        ([row(1, "x", rule=["math"])], ":1: rule=['math']: expected a text"),
        ([row(1, "x", rule="math + length(10, 20)")], ":1: num_tokens missing"),
        ([row(1, "x"), row(2, "x", "abc", rule="numeric")], ":2: gold='abc': 'abc' is not a number (rule numeric)"),
        ([row(1, "x", r"\boxed{}")], r":1: gold='\\boxed{}': empty (rule math); correct it"),
        ([row(1, "x", {"a": 1})], ":1: gold={'a': 1}: this rule needs a text"),
        ([row(1, "x", {"a": 1}, rule="code")], ":1: gold={'a': 1}: "),
        (["{", row(2, "x", "abc", rule="choice"), "["], ":1: not JSON"),
        ([row(1, "x", finish_reason="eos")], "expected stop or length"),
        ([row(1, "x", num_tokens="7")], "expected a whole number"),
        (["x"] * 30, "and 10 more lines"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_graded(tmp_path: Path, lines: list[Any], message: str) -> None:
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with pytest.raises(GradeInputError) as caught:
        grade_file(source, target, spec=SPEC)
    assert message in str(caught.value)
    assert not target.exists()


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [row(1, "42")])
    with pytest.raises(GradeInputError, match="no such file"):
        grade_file(tmp_path / "absent.jsonl", tmp_path / "out.jsonl", spec=SPEC)
    with pytest.raises(GradeInputError, match="same file"):
        grade_file(source, source, spec=SPEC)
    with pytest.raises(GradeInputError, match="cannot be written"):
        grade_file(source, tmp_path / "no" / "out.jsonl", spec=SPEC)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(GradeInputError, match="not UTF-8"):
        grade_file(tmp_path / "binary", tmp_path / "out.jsonl", spec=SPEC)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", [row(1, r"\boxed{42}"), row(2, r"\boxed{1}")])
    arguments = ["grade", "--input", str(source), "--output", str(tmp_path / "out.jsonl"), "--memory-mb", "512"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "2 graded: 1 correct, 1 incorrect; mean reward 0.5000\n"
    write(source, ["{}"])
    assert main(arguments) == 2
    assert "in.jsonl:1: id, response, gold missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--deadline-s=nan", "--deadline-s must be a positive number"),
        ("--deadline-s=inf", "--deadline-s must be a positive number"),
        ("--processes=0", "--processes must be a positive number"),
    ],
)
def test_options_that_no_verifier_could_have(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["grade", "--input", "i.jsonl", "--output", "o.jsonl", option])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_user_rule_is_loaded_before_anything_is_graded(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [row(1, "x", rule="user")])
    with pytest.raises(ConfigError, match="user_rule=no_such_module:reward: cannot be loaded"):
        grade_file(source, tmp_path / "out.jsonl", spec=VerifierSpec(1, 1.0, 512, "no_such_module:reward"))
