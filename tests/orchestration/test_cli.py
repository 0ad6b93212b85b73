"""The command line: instant help, exit codes, one message and no traceback for configuration errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.cli import COMMANDS, EXIT_CONFIG, EXIT_DONE, main

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = ("torch", "vllm", "deepspeed", "transformers", "mlflow")
PROBE = f"""
import json, sys
from orchestration.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    print(json.dumps([arguments, code, heavy]), file=sys.stderr)
"""


def probe(*commands: list[str]) -> list[tuple[list[str], int, list[str]]]:
    """Run commands one after the other in a process of its own: (arguments, exit code, heavy modules imported)."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stderr.splitlines() if line.startswith("[[")]


@pytest.fixture
def recipe(tiny_model_dir: Path, tmp_path: Path) -> Path:
    (tmp_path / "q.jsonl").write_text('{"question": "w1 w2", "answer": "3"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
name: t
output_dir: {tmp_path / "run"}
model: {{path: "{tiny_model_dir}", dtype: float32}}
data: {{train: {{path: "{tmp_path / "q.jsonl"}"}}, max_prompt_tokens: 64}}
sampling: {{max_new_tokens: 16}}
algorithm: {{prompts_per_step: 1, group_size: 2}}
"""
    )
    return path


def test_help_and_configuration_errors_are_light(recipe: Path) -> None:
    run = ["--config", str(recipe)]
    helps = [["--help"], *([command.name, "--help"] for command in COMMANDS)]
    errors = [
        ["train", *run, "steps=many"],
        ["validate", *run, "model.end_of_thinking=</never>"],
        ["train", *run, "data.train.path=/no"],
        ["train", *run, "model.path=/no"],
    ]
    outcomes = probe(*helps, *errors)
    assert outcomes == [(command, 0, []) for command in helps] + [(command, EXIT_CONFIG, []) for command in errors]


def test_every_command_can_be_loaded() -> None:
    for command in COMMANDS:
        assert callable(command.load()), command.name


def test_help_lists_every_command_and_codes_are_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == EXIT_CONFIG
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {command.name} .*{re.escape(command.summary)}", text, re.M) for command in COMMANDS)
    with pytest.raises(SystemExit) as stop:
        main(["nonsense"])
    assert stop.value.code == EXIT_CONFIG


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train.path=/no/such/file.json"], "/no/such/file.json: no such file"),
        (["model.path=/no/such/model"], "model.path=/no/such/model: no such directory"),
        (["algorithm.group_size=1"], "algorithm.group_size=1"),
        (["algorithm.prompts_per_step=3", "algorithm.mini_batches=2"], "not divisible"),
        (["algoritm.group_size=4"], "did you mean algorithm?"),
        (["steps=many"], "steps='many'"),
        (["rollout.num_gpus=99"], "ask for 99 GPUs"),
        (["data.max_prompt_tokens=1"], "data.max_prompt_tokens=1"),
    ],
)
def test_a_configuration_error_is_one_message_before_any_actor(
    recipe: Path, overrides: list[str], words: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for command in ("validate", "train"):
        assert main([command, "--config", str(recipe), *overrides]) == EXIT_CONFIG
        output = capfd.readouterr()
        assert words in output.err and "Traceback" not in output.err
        assert output.err.startswith(f"softgrpo {command}: ")
        assert len(output.err.strip().splitlines()) == 1
    assert not (recipe.parent / "run").exists()


def test_a_message_keeps_secrets_of_the_environment(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_TOKEN", "canary-value")
    assert main(["validate", "--config", str(recipe), "data.train.path=/canary-value/set.jsonl"]) == EXIT_CONFIG
    assert "/<redacted>/set.jsonl: no such file" in capsys.readouterr().err


def test_validate_names_the_command_that_makes_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["validate", "--config", str(ROOT / "configs" / "demo.yaml")]) == EXIT_CONFIG
    assert "are not made yet; `softgrpo demo` makes them" in capsys.readouterr().err


def test_validate_prints_facts(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["validate", "steps=7", "--config", str(recipe), "algorithm.prompts_per_step=2"]
    assert main(arguments) == EXIT_DONE, "overrides may stand before and behind --config"
    assert "7 steps" in (text := capsys.readouterr().out) and "t: valid" in text


def test_a_missing_model_passes_validation_and_stops_training(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    arguments = ["--config", str(recipe), "model.path=some-owner/some-model"]
    assert main(["validate", *arguments]) == EXIT_DONE
    assert "missing: model.path=some-owner/some-model" in capsys.readouterr().out
    assert main(["train", *arguments]) == EXIT_CONFIG
    assert "hf download some-owner/some-model" in capsys.readouterr().err


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestration", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("softgrpo ") and done.returncode == 0


def test_a_python_without_the_dependencies_is_named(recipe: Path) -> None:
    """As a job gets it whose head was started outside of the environment."""
    command = [sys.executable, "-S", "-m", "orchestration", "validate", "--config", str(recipe)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"{sys.executable} has no yaml: install" in done.stderr and "activate the environment" in done.stderr
