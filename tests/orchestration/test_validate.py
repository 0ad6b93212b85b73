"""`validate` and `describe`: what a run will be, and one clear message for what it cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestration import machine
from orchestration.config import Config, ConfigError, load_config, parse_config
from orchestration.describe import describe, zero_stage
from orchestration.user_rule import check_user_rule
from orchestration.validate import Resolved, pool_needs, validate
from reward.extraction import Answer
from reward.verifier import Verifier, VerifierSpec

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = ROOT / "configs"
RECIPES = ("qwen-1.5b", "qwen-1.5b-one-gpu", "qwen-7b", "llama-3b", "dirichlet", "gaussian", "grpo-discrete")

USER = {"rules": {"default": "math + user"}}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"w{i} w{i + 1}", "answer": str(i)}) for i in range(6)))
    return path


def configure(model_path: Path | str, data_path: Path, /, **sections: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "t",
        "model": {"path": str(model_path), "dtype": "float32", **sections.pop("model", {})},
        "data": {"train": {"path": str(data_path)}, "max_prompt_tokens": 16, **sections.pop("data", {})},
        "sampling": {"max_new_tokens": 32, **sections.pop("sampling", {})},
        "algorithm": {"prompts_per_step": 2, "group_size": 4, **sections.pop("algorithm", {})},
        **sections,
    }
    return parse_config(tree, "test")


def test_a_valid_run_is_resolved(tiny_model_dir: Path, questions: Path) -> None:
    evaluation = [{"path": str(questions), "name": "held-out", "limit": 3}]
    resolved = validate(configure(tiny_model_dir, questions, data={"evaluation": evaluation})).require_complete()
    assert resolved.end_of_thinking_id == 4
    assert resolved.train is not None and len(resolved.train.rows) == len(resolved.train.prompt_ids) == 6
    assert all(ids[-1] == 3 for ids in resolved.train.prompt_ids.values()), "prompts end with <think>"
    assert [prompts.name for prompts in resolved.evaluation] == ["held-out"]
    assert len(resolved.evaluation[0].rows) == 3


def test_derived_facts_are_printed(tiny_model_dir: Path, questions: Path) -> None:
    text = describe(validate(configure(tiny_model_dir, questions, pipeline={"max_staleness": 3})))
    for fact in (
        "6 prompts, prompts of 3 to 3 tokens, rule math",
        "2 prompts x 4 responses = 8 responses, at most 256 tokens",
        "at most 3 versions",
        "8 groups outstanding = (3 + 1) x 2",
        "(88 bytes a position)",
        "t: valid",
    ):
        assert fact in text


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", [True, False])
def test_the_stage_that_is_told_is_the_one_that_the_learner_runs(stage: int, dtype: str, offload: bool) -> None:
    from learner.optimizer import effective_zero_stage
    from learner.spec import LearnerSpec

    learner = {"zero_stage": stage, "offload_optimizer": offload}
    spec = LearnerSpec("m", 1, dtype=dtype, zero_stage=stage, offload_optimizer=offload)  # type: ignore[arg-type]
    told = zero_stage(configure("m", Path("d"), model={"dtype": dtype}, learner=learner))
    assert told == effective_zero_stage(spec)


@pytest.mark.parametrize(
    ("dtype", "learner", "words"),
    [
        ("float32", {}, "16.0 GiB a rank without activations"),  # a parameter, its gradient and two moments
        ("bfloat16", {}, "18.0 GiB a rank without activations"),  # two bytes, and from here on a master copy
        ("bfloat16", {"world_size": 2}, "12.0 GiB a rank without activations"),
        ("bfloat16", {"world_size": 2, "zero_stage": 3}, "9.0 GiB a rank without activations"),
        (
            "float32",
            {"offload_optimizer": True, "lora_rank": 4},
            "activations (less by offload_optimizer and lora_rank)",
        ),
    ],
)
def test_memory_of_a_rank(
    dtype: str, learner: dict[str, Any], words: str, tiny_model_dir: Path, questions: Path
) -> None:
    """Of a model of 2^30 parameters, all of them embeddings."""
    without_kl = {"kl": {"coefficient": 0}}
    resolved = validate(
        configure(tiny_model_dir, questions, model={"dtype": dtype}, learner=learner, algorithm=without_kl)
    )
    assert resolved.model is not None
    size = {"vocab_size": 2**20, "hidden_size": 2**10, "num_layers": 0, "tied_embeddings": True}
    assert words in describe(replace(resolved, model=replace(resolved.model, **size)))


def edited_model(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"end_of_thinking": "<never>"}}, r"end_of_thinking='<never>'"),
        ({"model": {"end_of_thinking": 64}}, r"end_of_thinking=64: not an id"),
        ({"data": {"max_prompt_tokens": 2}}, r"6 bad rows.*jsonl:1: the prompt has 3 tokens.*max_prompt_tokens=2"),
        ({"sampling": {"max_new_tokens": 500}}, r"= 516 exceeds the 512 positions"),
        ({"rollout": {"num_gpus": 64}}, r"ask for 64 GPUs, this machine has \d+; lower them, or set cluster.address"),
        ({"reward": {"rules": {"default": "maths"}}}, r"unknown rule 'maths'; known: math, .*reward.rules"),
        ({"reward": {"rules": {"default": "math + user"}}}, r"no user rule is configured; set reward.user_rule"),
        ({"reward": {**USER, "user_rule": "garbage"}}, r"user_rule=garbage: write it as module:function"),
        ({"reward": {**USER, "user_rule": "no_such_mod:f"}}, r"user_rule=no_such_mod:f: .*No module named"),
        ({"reward": {**USER, "user_rule": "json:nothing"}}, r"user_rule=json:nothing: .*no attribute 'nothing'"),
        ({"reward": {**USER, "user_rule": "math:pi"}}, r"user_rule=math:pi: .*no function"),
        ({"sampling": {"answer": {"temperature": 0}}}, r"sampling.answer.temperature=0.*positive"),
        ({"sampling": {"temperature": 0}}, r"sampling.temperature=0 with thinking: soft.*positive"),
        (
            {"data": {"evaluation": [{"path": "a/test.jsonl"}, {"path": "b/test.jsonl"}]}},
            r"a/test.jsonl and b/test.jsonl are both named test.*give each a `name`",
        ),
        ({"reward": {"rules": {"default": "choice"}}}, r"q.*: gold answer '.*': '.*' is not a letter"),
        ({"cluster": {"local_cpus": 1}}, r"cluster.local_cpus=1, but the pools ask for 2.5"),
    ],
)
def test_impossible_runs(
    tiny_model_dir: Path, questions: Path, sections: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = configure(tiny_model_dir, questions, **sections)
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        validate(config)


def test_a_user_rule_may_lie_in_the_directory_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray's actors find it, although a console script does not look there."""
    (tmp_path / "rule_of_this_run.py").write_text("def score(answer, gold):\n    return 0.25\n")
    monkeypatch.setattr(sys, "path", [entry or str(ROOT) for entry in sys.path])
    monkeypatch.chdir(tmp_path)
    check_user_rule("rule_of_this_run:score")
    with closing(Verifier(VerifierSpec(1, 60.0, 512, user_rule="rule_of_this_run:score"))) as verifier:
        (grade,) = verifier.score([Answer("x", "x")], ["1"], ["user"])
    assert grade.reward == 0.25, grade


def test_a_user_rule_is_loaded_elsewhere_and_only_where_a_rule_asks_for_it(
    tiny_model_dir: Path, questions: Path
) -> None:
    rule = "tests.reward.user_rules:double"
    loaded = set(sys.modules)
    assert validate(configure(tiny_model_dir, questions, reward={**USER, "user_rule": rule})).train
    assert "tests.reward.user_rules" not in set(sys.modules) - loaded
    assert validate(configure(tiny_model_dir, questions, reward={"user_rule": "no_such_mod:f"})).train


def test_greedy_decoding_is_refused_where_it_is_scored(tiny_model_dir: Path, questions: Path) -> None:
    greedy = configure(tiny_model_dir, questions, sampling={"temperature": 0, "answer": {"temperature": 0}})
    assert validate(greedy, trains=False).train
    with pytest.raises(ConfigError, match=r"(?s)answer\.temperature=0.*sampling\.temperature=0 with thinking: soft"):
        validate(greedy)
    # Discrete thinking is drawn, and scored, at the answer's temperature.
    validate(configure(tiny_model_dir, questions, sampling={"thinking": "discrete", "temperature": 0}))


def test_rewards_that_are_no_success_rates(tiny_model_dir: Path, questions: Path) -> None:
    reward = {"rules": {"default": "exact + 0.1*format"}}
    config = configure(tiny_model_dir, questions, reward=reward, algorithm={"advantage": "bnpo"})
    assert validate(config, trains=False).train
    with pytest.raises(ConfigError, match=r"rule 'exact \+ 0\.1\*format': .* rewards go from 0 to 1\.1; change"):
        validate(config)


def test_a_cache_too_small_for_one_sequence(tiny_model_dir: Path, questions: Path, tmp_path: Path) -> None:
    wide = edited_model(tiny_model_dir, tmp_path / "wide", num_hidden_layers=200)
    with pytest.raises(ConfigError, match=r"kv_cache_memory_mb=1 does not hold one sequence of 48 tokens"):
        validate(configure(wide, questions, rollout={"kv_cache_memory_mb": 1}))


def test_models_that_no_engine_could_start(tiny_model_dir: Path, questions: Path, tmp_path: Path) -> None:
    other = edited_model(tiny_model_dir, tmp_path / "other", architectures=["MambaForCausalLM"])
    with pytest.raises(ConfigError, match="architecture MambaForCausalLM is not among LlamaForCausalLM"):
        validate(configure(other, questions))
    with pytest.raises(ConfigError, match="tensor_parallel_size=3 does not divide the 2 attention heads"):
        validate(configure(tiny_model_dir, questions, rollout={"tensor_parallel_size": 3}))


def test_a_tokenizer_of_another_model(tiny_model_dir: Path, questions: Path, tmp_path: Path) -> None:
    small = edited_model(tiny_model_dir, tmp_path / "small", vocab_size=60)
    with pytest.raises(ConfigError, match=r"the tokenizer has ids up to 63, the embedding only 60 rows"):
        validate(configure(small, questions))


def test_gold_answers_that_no_response_can_match(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    rows = [{"question": "w1", "answer": answer} for answer in ("12", "\\frac{1}{2}", "\\frac{", "9^{9^{9^9}}")]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=r"q\.jsonl:3: gold answer .*frac") as error:
        validate(configure(tiny_model_dir, path, reward={"deadline_s": 1}))
    assert "data.max_bad_rows=2" in str(error.value) and "q.jsonl:4: gold answer" in str(error.value)
    kept = validate(configure(tiny_model_dir, path, data={"max_bad_rows": 2}, reward={"deadline_s": 1})).train
    assert kept is not None and len(kept.rows) == 2


def test_bad_rows_of_all_kinds_share_one_budget(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    long = {"question": "w1 " * 40, "answer": "A"}
    rows = [{"question": "w1", "answer": "B"}, {"question": "w1"}, {"question": "w2", "answer": "neither"}, long]
    path.write_text("\n".join(map(json.dumps, rows)))
    reward = {"rules": {"q": "choice"}}
    with pytest.raises(ConfigError, match=r"3 bad rows.*max_bad_rows=3"):
        validate(configure(tiny_model_dir, path, reward=reward, data={"max_bad_rows": 2}))
    assert validate(configure(tiny_model_dir, path, reward=reward, data={"max_bad_rows": 3})).train


def test_missing_weights_are_reported_and_stop_a_run(tiny_model_dir: Path, questions: Path, tmp_path: Path) -> None:
    bare = edited_model(tiny_model_dir, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    resolved = validate(configure(bare, questions))
    assert resolved.train is not None, "everything else was checked"
    assert "no weights (*.safetensors)" in describe(resolved)
    with pytest.raises(ConfigError, match="no weights"):
        resolved.require_complete()


def test_a_model_without_the_token_may_still_sample_discretely(tiny_model_dir: Path, questions: Path) -> None:
    config = configure(
        tiny_model_dir, questions, model={"end_of_thinking": "<never>"}, sampling={"thinking": "discrete"}
    )
    assert validate(config).end_of_thinking_id is None


def test_a_token_that_only_training_adds(tiny_model_dir: Path, questions: Path) -> None:
    """Even where the embedding has a row to spare, whose number would be taken for it."""
    absent = {"end_of_thinking": "<never>", "add_end_of_thinking": True}
    config = configure(tiny_model_dir, questions, model=absent)
    assert validate(config).end_of_thinking_id == 64
    with pytest.raises(ConfigError, match=r"no '<never>', and only `softgrpo train` adds it; give the model that"):
        validate(config, trains=False)
    there = configure(tiny_model_dir, questions, model={"add_end_of_thinking": True})
    assert validate(there, trains=False).end_of_thinking_id == 4


def test_an_ordinary_token_as_end_of_thinking_is_a_warning(tiny_model_dir: Path, questions: Path) -> None:
    resolved = validate(configure(tiny_model_dir, questions, model={"end_of_thinking": 9}))
    assert any("is an ordinary token" in warning for warning in resolved.warnings)


def test_fewer_prompts_than_a_step_is_a_warning(tiny_model_dir: Path, questions: Path) -> None:
    resolved = validate(configure(tiny_model_dir, questions, algorithm={"prompts_per_step": 7, "group_size": 2}))
    assert any("6 prompts for steps of 7" in warning for warning in resolved.warnings)


def test_pools_add_up() -> None:
    config = configure("m", Path("d"), rollout={"num_actors": 3, "num_gpus": 2, "tensor_parallel_size": 2})
    needs = pool_needs(config)
    assert (needs.rollout_gpus, needs.gpus, needs.cpus) == (6, 6, 3 + 0.5 + 1)
    fractional = configure("m", Path("d"), rollout={"num_gpus": 0.5}, learner={"num_gpus": 0.5})
    assert pool_needs(fractional).gpus == 1


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,1,GPU-abc", 3)])
def test_gpus_are_those_visible(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.num_gpus() == count


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_up_to_what_has_to_be_fetched(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.name == name
    resolved = validate(config)
    assert resolved.missing and all("hf download" in absent for absent in resolved.missing)
    assert resolved.warnings == ()
    assert f"{name}: valid, but something has to be fetched first" in describe(resolved)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_with_a_model_and_data_at_hand(
    name: str, tiny_model_dir: Path, tmp_path: Path, shared_dir: Path
) -> None:
    model = edited_model(tiny_model_dir, tmp_path / "model", max_position_embeddings=16384)
    data = shared_dir / "data"
    config = load_config(
        CONFIGS / f"{name}.yaml",
        [
            f"model.path={model}",
            f"data.train.path={data / 'aime.parquet'}",
            f"data.evaluation=[{{path: {data / 'amc23.json'}}}]",
        ],
    )
    resolved: Resolved = validate(config).require_complete()
    assert resolved.train is not None and len(resolved.train.rows) == 30


def test_every_recipe_is_listed_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - {"demo"} == set(RECIPES)
