"""The configuration tree: every mistake names the key, the value and the fix; what is saved is what ran."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.config import Config, ConfigError, dump_config, load_config, parse_config
from orchestration.config_rules import REFERENCE_SAMPLING, beyond_success_rates, untrainable

MINIMAL: dict[str, Any] = {"name": "t", "model": {"path": "m"}, "data": {"train": {"path": "d"}}}

RELEASED = {"noise_clip": [-1.5, 3.0], "log_epsilon": 1e-6}


def configure(**sections: Any) -> Config:
    return parse_config({**MINIMAL, **sections}, "recipe.yaml")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"algorithm": {"group_sise": 4}}, ["algorithm.group_sise=4", "did you mean group_size?"]),
        ({"rollout": {"zzz": 1}}, ["rollout.zzz=1", "known keys: num_actors"]),
        ({"data": {"train": {"path": "d", "colums": {}}}}, ["data.train.colums={}", "did you mean columns?"]),
        ({"algorithm": {"group_size": 1}}, ["algorithm.group_size=1", "greater than or equal to 2"]),
        ({"sampling": {"top_p": 1.5}}, ["sampling.top_p=1.5", "less than or equal to 1"]),
        ({"sampling": {"noise": "gumble"}}, ["sampling.noise='gumble'", "'gumbel'"]),
        ({"steps": "ten"}, ["steps='ten'", "integer"]),
        ({"name": "../x"}, ["name='../x'"]),
        ({"seed": -1}, ["seed=-1", "greater than or equal to 0"]),
        ({"seed": 2**32}, ["seed=4294967296", "less than 4294967296"]),
        ({"steps": True}, ["steps=True", "expected a number"]),
        ({"sampling": {"max_thinking_tokens": True}}, ["sampling.max_thinking_tokens=True", "expected a number"]),
        ({"learner": {"zero_stage": True}}, ["learner.zero_stage=True", "expected a number"]),
        ({"learner": {"betas": [True, 0.9]}}, ["learner.betas=[True, 0.9]", "expected a number"]),
        ({"learner": {"betas": [2, -3]}}, ["learner.betas.0=2", "learner.betas.1=-3"]),
        ({"learner": {"learning_rate": math.inf}}, ["learner.learning_rate=inf", "finite"]),
        ({"sampling": {"noise_clip": [math.nan, math.nan]}}, ["sampling.noise_clip.0=nan", "finite"]),
        ({"checkpoint": {"stop_grace_s": math.inf}}, ["checkpoint.stop_grace_s=inf", "finite"]),
        ({"checkpoint": {"stop_grace_s": 1e300}}, ["checkpoint.stop_grace_s=1e+300", "less than"]),
        ({"sampling": {"answer": {"temperature": 0.005}}}, ["sampling.answer.temperature=0.005", "vLLM", "0.01"]),
        ({"rollout": {"num_gpus": 1.5}}, ["rollout.num_gpus=1.5", "whole"]),
        ({"learner": {"num_gpus": 2.5}}, ["learner.num_gpus=2.5", "whole"]),
        ({"model": {}}, ["model.path: required, but missing"]),
        ({"algorithm": {"prompts_per_step": 6, "mini_batches": 4}}, ["prompts_per_step=6", "mini_batches=4"]),
        (
            {"learner": {"world_size": 9}, "algorithm": {"prompts_per_step": 1, "group_size": 8}},
            ["world_size=9", "the 8 responses"],
        ),
        ({"sampling": {"max_new_tokens": 10, "max_thinking_tokens": 10}}, ["max_thinking_tokens=10", "no room"]),
        ({"sampling": {"noise": "none"}}, ["noise=none", "likelihood=censored", "set noise: gumbel"]),
        ({"sampling": {"noise": "gaussian"}}, ["noise=gaussian", "likelihood: gaussian"]),
        ({"algorithm": {"likelihood": "dirichlet"}}, ["noise=gumbel", "set noise: dirichlet"]),
        ({"sampling": {"noise_clip": [-1.5, 3]}}, ["noise_clip=[-1.5, 3.0]", "remove noise_clip"]),
        (
            {"sampling": {"noise_clip": [3, -1.5]}, "algorithm": {"likelihood": "reference"}},
            ["noise_clip=[3.0, -1.5]", "low < high"],
        ),
        (
            {"sampling": {"censor_delta": 0.01}, "algorithm": {"likelihood": "concrete"}},
            ["censor_delta=0.01", "remove censor_delta"],
        ),
        (
            {"algorithm": {"importance_cap": 2.0, "old_log_density": "behaviour"}},
            ["importance_cap=2.0", "old_log_density: recompute"],
        ),
        ({"rollout": {"num_gpus": 0.5, "tensor_parallel_size": 2}}, ["num_gpus=0.5", "set num_gpus to 2"]),
        ({"learner": {"num_gpus": 0.5, "world_size": 2}}, ["num_gpus=0.5", "world_size=2", "get the same one"]),
        ({"pipeline": {"transport": "nccl"}}, ["learner.num_gpus=0", "set both to at least 1"]),
        (
            {"pipeline": {"transport": "nccl"}, "learner": {"num_gpus": 1}, "rollout": {"num_gpus": 0.5}},
            ["rollout.num_gpus=0.5", "no GPU that two actors share", "transport: object_store"],
        ),
    ],
)
def test_a_mistake_names_key_value_and_fix(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        configure(**sections)
    message = str(error.value)
    assert message.startswith("recipe.yaml: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        *(
            ({"sampling": {"noise": noise}, "algorithm": {"likelihood": "argmax"}}, [f"noise={noise}", "noise: gumbel"])
            for noise in ("gaussian", "dirichlet", "none")
        ),
        (
            {"sampling": {"noise_clip": [-1.5, 3]}, "algorithm": {"likelihood": "argmax"}},
            ["noise_clip=[-1.5, 3.0]", "likelihood=argmax", "remove noise_clip"],
        ),
        *(
            (
                {"sampling": {"log_epsilon": 1e-6, "noise": noise}, "algorithm": {"likelihood": likelihood}},
                ["log_epsilon=1e-06", f"likelihood={likelihood}", "remove log_epsilon"],
            )
            for likelihood, noise in (("censored", "gumbel"), ("argmax", "gumbel"), ("gaussian", "gaussian"))
        ),
        *(
            (
                {"sampling": {**RELEASED, **change}, "algorithm": {"likelihood": "reference"}},
                ["likelihood=reference", words, "noise_clip: [-1.5, 3], log_epsilon: 1e-06, noise_scale: 1"],
            )
            for change, words in (
                ({"noise_clip": None}, "sampling.noise_clip=null"),
                ({"noise_clip": [-1.5, 2]}, "sampling.noise_clip=[-1.5, 2]"),
                ({"log_epsilon": 0}, "sampling.log_epsilon=0"),
                ({"noise_scale": 0.5}, "sampling.noise_scale=0.5"),
            )
        ),
        *(
            (
                {"sampling": RELEASED, "algorithm": {"likelihood": "reference", **change}},
                ["likelihood=reference", words, "set old_log_density: recompute and no importance_cap"],
            )
            for change, words in (
                ({"old_log_density": "behaviour"}, "old_log_density=behaviour"),
                ({"importance_cap": 2.0}, "importance_cap=2.0"),
            )
        ),
    ],
)
def test_what_has_no_density_is_decoded_and_not_trained(sections: dict[str, Any], words: list[str]) -> None:
    (message, *_) = untrainable(configure(**sections))
    for word in words:
        assert word in message
    assert not untrainable(configure(**sections | {"sampling": {**sections["sampling"], "thinking": "discrete"}}))


def test_several_mistakes_are_told_together() -> None:
    with pytest.raises(ConfigError) as error:
        configure(steps=0, seed="x")
    assert len(str(error.value).splitlines()) == 2


def test_discrete_thinking_needs_nothing_of_soft_tokens() -> None:
    config = configure(sampling={"thinking": "discrete", "noise": "none", "temperature": 0})
    assert config.censor_delta is None


def test_the_released_way_to_draw_is_the_one_that_reference_scores() -> None:
    from learner.likelihood import REFERENCE_CLIP, REFERENCE_LOG_EPSILON

    assert (
        REFERENCE_SAMPLING["noise_clip"],
        REFERENCE_SAMPLING["log_epsilon"],
    ) == (REFERENCE_CLIP, REFERENCE_LOG_EPSILON)
    config = configure(sampling=RELEASED, algorithm={"likelihood": "reference"})
    assert config.sampling.noise_clip == REFERENCE_CLIP and not untrainable(config)


@pytest.mark.parametrize("noise", ["gumbel", "gaussian", "none"])
def test_what_no_likelihood_scores_may_be_drawn_in_any_way(noise: str) -> None:
    soft = configure(sampling={**RELEASED, "noise": noise, "noise_scale": 0.5}, algorithm={"likelihood": "none"})
    discrete = configure(sampling={**RELEASED, "noise": noise, "thinking": "discrete"})
    assert untrainable(soft) == untrainable(discrete) == []


@pytest.mark.parametrize(
    ("rule", "ends"),
    [
        ("math", None),
        ("0.9*math + 0.1*format", None),
        ("math + user", None),
        ("math + 0.1*format", "0 to 1.1"),
        ("math + length(10, 20)", "-1 to 1"),
        ("math + -0.5*format", "-0.5 to 1"),
        ("math + -1*length(10, 20)", "0 to 2"),
    ],
)
def test_rules_whose_rewards_are_no_success_rates(rule: str, ends: str | None) -> None:
    found = beyond_success_rates(["choice", rule])
    assert [f"{rule!r}" in problem and f"go from {ends};" in problem for problem in found] == [True] * bool(ends)


def test_censoring_follows_the_likelihood() -> None:
    assert configure().censor_delta == 1e-3
    assert configure(sampling={"censor_delta": 0.01}).censor_delta == 0.01
    assert configure(algorithm={"likelihood": "concrete"}).censor_delta is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("a: [", "not YAML"),
        ("- a list", "found list"),
        ("", "found NoneType"),
        ("name: t\npipeline: {}\nname: u\n", "'name' a second time[^$]*line 3"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_overrides_are_yaml_and_reach_everywhere(recipe: Path) -> None:
    config = load_config(
        recipe,
        ["steps=7", "sampling.noise_clip=null", "data.evaluation=[{path: e}]", "algorithm.kl.coefficient=1.0e-2"],
    )
    assert (config.steps, config.data.evaluation[0].path, config.algorithm.kl.coefficient) == (7, "e", 0.01)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("steps=[", "not YAML"),
        ("steps=0b_", "not YAML: '0b_' is no int"),
        ("name=2024-13-45", "not YAML: '2024-13-45' is no timestamp"),
        ("name.x=1", "name is a value, not a section"),
    ],
)
def test_bad_overrides(recipe: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(recipe, [override])


@pytest.mark.parametrize(
    "override",
    ["tracking.mlflow_password=s3cret", "tracking.password.x=s3cret", "hf_token=[s3cret", "name.api_key=s3cret"],
)
def test_secrets_are_not_repeated(recipe: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="<redacted>") as error:
        load_config(recipe, [override])
    assert "s3cret" not in str(error.value)
    assert override.partition("=")[0].split(".")[-1] in str(error.value)


def test_what_is_saved_loads_to_the_same(tmp_path: Path) -> None:
    config = configure(sampling=RELEASED, algorithm={"likelihood": "reference"})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_derived_facts() -> None:
    config = configure(
        algorithm={"prompts_per_step": 4, "group_size": 3},
        pipeline={"max_staleness": 2},
        sampling={"max_new_tokens": 8},
    )
    assert (config.slots, config.responses_per_step, config.thinking_budget) == (12, 12, 8)
    assert config.max_model_len == config.data.max_prompt_tokens + 8
    assert config.run_dir == Path("outputs/t")
    assert configure(output_dir="/x/y").run_dir == Path("/x/y")


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        configure().steps = 3
