"""`softgrpo generate` without an engine: prompts, room, requests, traces; and once with a real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestration.chain_task import question_text
from orchestration.config import ConfigError
from orchestration.generate import Prompt, main, make_requests, prepare, read_prompts, soft_trace
from orchestration.tiny_model import TinyModelShape, build_tiny_model
from rollout.request import RolloutRequest
from tests.orchestration.test_evaluation_store import trajectory

NOT_FOR_INFERENCE = ("ray", "deepspeed", "math_verify", "mlflow", "matplotlib", "peft")
HIDING = """
import sys
from importlib.machinery import PathFinder
hidden, find = sys.argv[1].split(","), PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in hidden else find(name, *rest))
from orchestration.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build_tiny_model(directory, TinyModelShape(), seed=0)
    return directory


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(f"p{i}", [{"role": "user", "content": text}]) for i, text in enumerate(texts)]


def test_prompts_of_a_file(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\n  two  \n")
    assert [(p.prompt_id, p.messages[0]["content"]) for p in read_prompts(lines)] == [
        ("line-1", "one"),
        ("line-3", "  two  "),
    ]
    rows = tmp_path / "prompts.jsonl"
    records = [
        {"id": "x", "question": "a?"},
        {"prompt": "b?"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "c?"}]},
    ]
    rows.write_text("\n".join(map(json.dumps, records)))
    read = read_prompts(rows)
    assert [p.prompt_id for p in read] == ["x", "line-2", "line-3"]
    assert [p.messages[-1]["content"] for p in read] == ["a?", "b?", "c?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"answer": "no prompt"}', "jsonl:1: no prompt"),
        ("not json", "jsonl:1: not JSON"),
        ("[1]", "expected an object"),
        ('{"messages": [{"content": "x"}]}', "jsonl:1: message {'content': 'x'} needs role and content"),
        ('{"messages": ["hi"]}', "jsonl:1: message 'hi' needs role and content"),
        ('{"messages": [{"role": "user", "content": 5}]}', "needs role and content"),
        ('{"prompt": ' + "7" * 5000 + "}", "jsonl:1: not JSON"),
        ("[" * 100_000, "jsonl:1: not JSON"),
        ("", "holds no prompt"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "ids repeat"),
    ],
)
def test_bad_files_are_named_by_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(path)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = ["one\u2028line", "one\x85line\u2029"]
    path.write_bytes("\r\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts).encode())
    assert [prompt.messages[0]["content"] for prompt in read_prompts(path)] == texts


def test_half_a_character_is_no_prompt(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\\ud800', half of a character"):
        prepare(str(model_dir), None, [], prompts("1 2 = \ud800"), "soft")


def test_an_output_that_cannot_be_written_is_said_before_the_engine_starts(model_dir: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(model_dir), "--prompt", "1 2 =", "--output", str(tmp_path / "absent" / "o.jsonl")]
    with pytest.raises(ConfigError, match=r"--output .*o\.jsonl: cannot be written: No such file"):
        main(arguments)


def test_answers_get_the_room_that_the_model_has(model_dir: Path) -> None:
    asked = prompts(question_text((3, 1, 4, 0, 2)), "1 2 =")
    resolved, encoded = prepare(str(model_dir), None, ["seed=7"], asked, "soft")
    assert [len(ids) for _, ids in encoded] == [8, 5]
    assert resolved.config.max_model_len == 128
    assert resolved.config.sampling.max_new_tokens == 120
    assert resolved.end_of_thinking_id == 5
    assert resolved.config.seed == 7
    shorter, _ = prepare(str(model_dir), None, ["sampling.max_new_tokens=10"], asked, "discrete")
    assert shorter.config.max_model_len == 18
    assert shorter.end_of_thinking_id is None
    with pytest.raises(ConfigError, match="has 128 positions"):
        prepare(str(model_dir), None, ["sampling.max_new_tokens=121"], asked, "soft")
    with pytest.raises(ConfigError, match="no such directory"):
        prepare(str(model_dir / "nothing"), None, [], asked, "soft")
    missing = ["model.end_of_thinking=<done>", "model.add_end_of_thinking=true"]
    with pytest.raises(ConfigError, match=r"add_end_of_thinking: .* no '<done>', and only `softgrpo train` adds it"):
        prepare(str(model_dir), None, missing, asked, "soft")
    assert prepare(str(model_dir), None, missing, asked, "discrete")[0].end_of_thinking_id is None
    with pytest.raises(ConfigError, match="unknown key"):
        prepare(str(model_dir), None, ["sampling.temprature=1"], asked, "soft")


def test_seeds_belong_to_prompt_and_sample() -> None:
    requests = list(make_requests([("a", (1,)), ("b", (2,))], 2, "soft", seed=0))
    assert [(r.prompt_id, r.sample_index) for r in requests] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert len({r.seed for r in requests}) == 4
    alone = list(make_requests([("b", (2,))], 1, "soft", seed=0))
    assert alone[0].seed == requests[2].seed


def test_trace_has_the_retained_candidates_of_soft_positions_only() -> None:
    trace = soft_trace(trajectory(RolloutRequest("r", "g", "p", 0, 1, (1, 2))), lambda token: f"t{token}")
    assert [position["kind"] for position in trace] == ["soft", "soft", "soft", "ended", "token"]
    assert [candidate["token"] for candidate in trace[0]["candidates"]] == ["t0", "t1"]
    assert np.isclose(trace[0]["candidates"][1]["weight"], 0.1)
    assert "candidates" not in trace[3]


@pytest.mark.slow
def test_a_real_engine_answers_and_standard_output_holds_answers_only(model_dir: Path) -> None:
    """Without the training stack: as after `pip install softgrpo[inference]`."""
    command = [
        *(sys.executable, "-c", HIDING, ",".join(NOT_FOR_INFERENCE)),
        *("generate", "--model", str(model_dir), "--samples", "2", "--trace"),
        *("--prompt", question_text((3, 1, 4, 0, 2)), "sampling.max_new_tokens=6", "rollout.max_num_seqs=4"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(a["id"], a["sample"]) for a in answers} == {("prompt-0", 0), ("prompt-0", 1)}
    assert all(len(a["trace"]) == a["length"] <= 6 for a in answers)
    assert any(position["kind"] == "soft" for a in answers for position in a["trace"])
