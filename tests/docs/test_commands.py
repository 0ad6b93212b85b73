"""Every command in the documentation is run where that is cheap, and parsed by its own parser where it is not."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

from orchestration import cli, doctor, submit
from orchestration.config import ConfigError, load_config
from orchestration.kuberay import ClusterShape, render, to_yaml
from tests.docs.pages import ROOT, commands
from tests.orchestration.kuberay_recipes import gpu_recipe

EXTERNAL = {"export", "docker", "git", "kubectl", "mlflow"}
"""Programs that are not ours and not installed with us; their lines are only split."""


def of_program(name: str) -> list[list[str]]:
    return [words for _, words in commands() if words[0] == name]


def recipe_arguments(arguments: list[str]) -> None:
    """`--config FILE key=value ...` must load."""
    parser = cli.recipe_parser("any", "any")
    for flag in ("--resume", "--auto-resume"):
        parser.add_argument(flag, action="store_true")
    namespace = parser.parse_args(arguments)
    load_config(ROOT / namespace.config, namespace.overrides)


def test_only_known_programs_are_shown() -> None:
    known = EXTERNAL | {"softgrpo", "make", "ray", "pip"}
    assert {words[0] for _, words in commands()} <= known


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [text for words in of_program("pip") for word in words for text in re.findall(r"\.\[(.+)\]", word)]
    named = {extra for text in found for extra in text.split(",")}
    assert named and named <= set(project["optional-dependencies"])


@pytest.mark.parametrize("words", of_program("softgrpo"), ids=" ".join)
def test_our_commands(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command, arguments = words[1], words[2:]
    assert command in {known.name for known in cli.COMMANDS}
    if command in ("train", "validate"):
        recipe_arguments(arguments)
    elif command == "submit":
        namespace = submit._parser().parse_args(arguments)
        config = load_config(ROOT / namespace.config, namespace.overrides)
        submit.plan_submission(config, resume=namespace.resume, entrypoint=None, env_vars={}, working_dir=ROOT)
        submit._environment(namespace.env)
    elif command == "doctor":
        doctor._parser().parse_args(arguments)
    elif command == "kuberay":
        run_kuberay(arguments, tmp_path, monkeypatch)
    elif command in ("evaluate", "generate", "report"):
        module = importlib.import_module(next(c.target for c in cli.COMMANDS if c.name == command).partition(":")[0])
        namespace = module._parser().parse_intermixed_args(arguments)
        if getattr(namespace, "config", None):
            load_config(namespace.config, namespace.overrides)
    elif command == "grade":
        run_grade(arguments, tmp_path, monkeypatch)
    elif command == "scale":
        monkeypatch.chdir(tmp_path)  # no run goes on there
        with pytest.raises(ConfigError, match="no driver runs there"):
            cli.Command("scale", "", "orchestration.scale:main").load()(arguments)
    else:
        pytest.fail(f"say here how `softgrpo {command}` is checked")


def run_grade(arguments: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestration.grade import main

    monkeypatch.chdir(directory)
    line = {"id": "a", "response": "<think> 2 </think> \\boxed{4}", "gold": "4"}
    (directory / arguments[arguments.index("--input") + 1]).write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert main(arguments) == 0
    assert json.loads((directory / "graded.jsonl").read_text(encoding="utf-8"))["verdict"] == "correct"


def run_kuberay(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestration.kuberay_command import main

    manifest = tmp_path / "rayjob.yaml"
    manifest.write_text(to_yaml(render(gpu_recipe(), ClusterShape())), encoding="utf-8")
    stand_ins = {
        "build/kuberay": str(tmp_path / "base"),
        "build/kuberay/rayjob.yaml": str(manifest),
        "-": str(manifest),
    }
    assert main([stand_ins.get(word, word) for word in arguments]) == 0


def test_ours_in_ray_job_submit() -> None:
    """What follows `--` in `ray job submit` is a command of ours."""
    ours = [words[words.index("--") + 1 :] for words in of_program("ray") if "--" in words]
    assert ours
    for words in ours:
        assert words[:4] == ["python", "-m", "orchestration", "train"]
        recipe_arguments([str(ROOT / word) if word.startswith("configs/") else word for word in words[4:]])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_commands_and_options_exist() -> None:
    from ray.scripts.scripts import cli as ray_cli

    for words in of_program("ray"):
        node: Any = ray_cli
        rest = words[1 : words.index("--")] if "--" in words else words[1:]
        while rest and hasattr(node, "commands") and rest[0] in node.commands:
            node = node.commands[rest.pop(0)]
        known = {option for parameter in node.params for option in parameter.opts}
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert options <= known, words


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in of_program("make"):
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
        for assignment in (word for word in words[1:] if "=" in word):
            name, _, value = assignment.partition("=")
            assert re.search(rf"^{name} \?=|\$\({name}\)", makefile, re.MULTILINE)
            assert name != "LOCK" or (ROOT / value).is_file()


def test_image_targets_exist() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for words in of_program("docker"):
        assert f" AS {words[words.index('--target') + 1]}" in dockerfile


def test_auto_resume_is_an_option_of_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rendered RayJobs rely on it: start the first time, resume the second."""
    seen: list[bool] = []
    stand_in: Any = types.ModuleType("orchestration.train")
    stand_in.run_training = lambda config, *, resume: seen.append(resume) or 0
    monkeypatch.setitem(sys.modules, "orchestration.train", stand_in)
    arguments = ["--config", str(ROOT / "configs/qwen-1.5b.yaml"), f"output_dir={tmp_path}/run", "--auto-resume"]
    assert cli.train(arguments) == 0
    (tmp_path / "run" / "lost+found").mkdir(parents=True)
    assert cli.train(arguments) == 0
    (tmp_path / "run" / "driver.lock").touch()
    assert cli.train(arguments) == 0
    assert seen == [False, False, True]


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_renders(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from orchestration.kuberay_command import main

    if load_config(recipe).learner.num_gpus % 1:
        with pytest.raises(ConfigError, match="Kubernetes gives pods whole GPUs"):
            main(["render", "--config", str(recipe)])
        return
    assert main(["render", "--config", str(recipe)]) == 0
    manifest = tmp_path / "job.yaml"
    manifest.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["validate", str(manifest)]) == 0
