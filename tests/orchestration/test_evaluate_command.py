"""`softgrpo evaluate` with real engines and verifiers, once; what it says when there is nothing to do or to mix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestration.chain_task import ChainTask, write_questions
from orchestration.config import ConfigError, parse_config
from orchestration.evaluate import EvaluationSettings, evaluation_requests
from orchestration.evaluate_command import _calls, main
from orchestration.evaluation_arms import make_arms
from orchestration.evaluation_store import ResultDirectory
from orchestration.tiny_model import TinyModelShape, build_tiny_model
from tests.end_to_end.recipes import ROOT
from tests.orchestration.test_evaluate import prompt_set


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("evaluation")
    build_tiny_model(place / "model", TinyModelShape(), seed=0)
    write_questions(ChainTask(), place, num_evaluation=6)
    tree = {
        "name": "small",
        "output_dir": str(place / "run"),
        "model": {"path": str(place / "model"), "dtype": "float32"},
        "data": {
            "train": {"path": "not needed"},
            "evaluation": [{"path": str(place / "held_out.jsonl"), "name": "chain"}],
            "max_prompt_tokens": 16,
        },
        "sampling": {"max_new_tokens": 12, "max_thinking_tokens": 6},
        "rollout": {"max_num_seqs": 16, "kv_cache_memory_mb": 64},
        "evaluation": {"limit": 4},
        "cluster": {"local_cpus": 4, "object_store_mb": 100},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return place / "recipe.yaml"


@pytest.mark.slow
def test_arms_share_an_engine_and_a_second_call_has_nothing_to_do(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "evaluate",
        "--config",
        str(recipe),
        "--arms",
        "soft,discrete,argmax,mean",
        "--samples",
        "4",
        "--traces",
        "4",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "orchestration", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "argmax - soft" in done.stdout

    result = ResultDirectory(recipe.parent / "run" / "evaluation")
    arms = ("soft", "discrete", "argmax", "mean")
    soft, discrete, argmax, mean = (result.samples("chain", arm) for arm in arms)
    for samples in (soft, discrete, argmax, mean):
        assert len(samples) == 4
        assert all(len(found) == 4 for found in samples.values())
    mixtures = [sample.active for found in soft.values() for sample in found if sample.soft_length]
    assert max(value for value in mixtures if value) > 1, "soft positions mix candidates"
    replaced = [sample for found in argmax.values() for sample in found if sample.soft_length]
    assert replaced
    assert all(sample.active == 1 and sample.top_weight == 1 for sample in replaced), "argmax leaves one candidate"
    for found in mean.values():
        assert len({sample.trace for sample in found}) == 1, "without noise everyone thinks the same"
        assert found[0].active is None or found[0].active > 1, "and still in mixtures"
    assert not any(sample.soft_length for found in discrete.values() for sample in found)
    first = {question: found[0].trace for question, found in soft.items()}
    assert set(first) == set(argmax) == set(discrete)

    monkeypatch.setattr("orchestration.cluster.connected", None)  # calling it would fail
    assert main(arguments[1:]) == 0
    record = json.loads((result.path / "results.json").read_text())
    assert [entry["arm"] for entry in record["results"]] == list(arms)
    with pytest.raises(ConfigError, match="samples was 4 and is now 2"):
        main([*arguments[1:], "--samples", "2"])


def test_nothing_to_evaluate_is_said_before_anything_starts(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="no benchmark"):
        main(["--config", str(recipe), "data.evaluation=[]"])
    with pytest.raises(ConfigError, match="choose from soft, discrete, argmax, mean"):
        main(["--config", str(recipe), "--arms", "soft,greedy"])
    with pytest.raises(ConfigError, match="no such directory"):
        main(["--config", str(recipe), "--checkpoint", str(recipe.parent / "nothing")])
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def test_arms_answer_the_same_questions_with_the_same_seeds() -> None:
    """The first ones of every benchmark; the number of samples is the command's, not the recipe's."""
    tree = {"name": "t", "model": {"path": "m"}, "data": {"train": {"path": "d"}}, "seed": 7}
    config = parse_config({**tree, "evaluation": {"limit": 2, "samples": 9}}, "test")
    asked = {}
    for arm in make_arms(["soft", "discrete"], config, "matched"):
        requests = [each for _, part in _calls(prompt_set("a", "b", "c"), arm, config, 3) for each in part]
        assert {request.thinking for request in requests} == {arm.name}
        assert [request.prompt_id for request in requests] == ["a"] * 3 + ["b"] * 3
        asked[arm.name] = [request.seed for request in requests]
    assert asked["soft"] == asked["discrete"]
    row, prompts = prompt_set("a").rows[0], prompt_set("a")
    (of_seed_7,) = evaluation_requests(row, prompts, EvaluationSettings(samples=3, seed=7))
    assert asked["soft"][:3] == [request.seed for request in of_seed_7]


@pytest.mark.parametrize("text", ["0.6,}", "0.6,", "", "warm", "-1", "nan", "0.6,.inf", "inf"])
def test_temperatures_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--config", "recipe.yaml", f"--temperatures={text}"])
    assert stopped.value.code == 2
    assert "numbers with commas" in capsys.readouterr().err
