"""What a plan tells the pools and asks of Ray for each: every key of the recipe arrives, and nothing else moves."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.config import parse_config
from orchestration.config_sections import AlgorithmConfig, LearnerConfig
from orchestration.logs import POOL_VARIABLE
from orchestration.plan import Plan, make_plan
from orchestration.validate import Resolved

TREE: dict[str, Any] = {
    "name": "t",
    "model": {"path": "m"},
    "data": {"train": {"path": "t.jsonl"}},
    "algorithm": {"likelihood": "none"},  # goes with every setting of a soft token
}
SECTION_OF = {"learner": "learner", "algorithm": "learner", "rollout": "engine", "reward": "verifier"}
OMP = "runtime_env.env_vars.OMP_NUM_THREADS"

SAME_NAME = {
    "learner.zero_stage": 3,
    "learner.offload_optimizer": True,
    "learner.gradient_checkpointing": True,
    "learner.lora_rank": 3,
    "learner.learning_rate": 0.5,
    "learner.lr_schedule": "cosine",
    "learner.warmup_steps": 3,
    "learner.weight_decay": 0.5,
    "learner.betas": (0.5, 0.6),
    "learner.max_grad_norm": 9.0,
    "learner.micro_batch_tokens": 99,
    "learner.differentiate_soft_inputs": True,
    "learner.world_size": 2,
    "learner.collective_timeout_s": 9.0,
    "learner.startup_timeout_s": 9.0,
    "learner.step_timeout_s": 9.0,
    "algorithm.likelihood": "argmax",
    "algorithm.old_log_density": "behaviour",
    "algorithm.mini_batches": 2,
    "algorithm.epochs": 2,
    "algorithm.advantage": "rloo",
    "algorithm.policy_loss": "gspo",
    "algorithm.clip_low": 0.1,
    "algorithm.clip_high": 0.3,
    "algorithm.dual_clip": 5.0,
    "algorithm.aggregation": "constant",
    "algorithm.importance_cap": 2.0,
    "algorithm.entropy_bonus": 0.1,
    "rollout.max_num_seqs": 3,
    "rollout.max_num_batched_tokens": 99,
    "rollout.gpu_memory_utilization": 0.3,
    "reward.deadline_s": 9.0,
    "reward.memory_mb": 999,
    "reward.user_rule": "a:b",
    "reward.failure_alarm": 0.9,
}
"""Keys that arrive in one spec, under their own name."""

ELSEWHERE: dict[str, tuple[Any, dict[str, Any]]] = {
    "seed": (7, {"engine.seed": 7, "learner.seed": 7}),
    "steps": (9, {"learner.total_steps": 9}),
    "model.dtype": ("float32", {"engine.dtype": "float32", "learner.dtype": "float32"}),
    "model.trust_remote_code": (True, {"engine.trust_remote_code": True, "learner.trust_remote_code": True}),
    "data.max_prompt_tokens": (9, {"engine.max_model_len": 9 + 8192}),
    "sampling.temperature": (0.7, {"engine.soft.temperature": 0.7, "learner.temperature": 0.7}),
    "sampling.top_k": (3, {"engine.soft.top_k": 3, "engine.soft.max_candidates": 3, "learner.max_candidates": 3}),
    "sampling.top_p": (0.5, {"engine.soft.top_p": 0.5}),
    "sampling.min_p": (0.1, {"engine.soft.min_p": 0.1}),
    "sampling.gumbel_temperature": (0.3, {"engine.soft.gumbel_temperature": 0.3, "learner.gumbel_temperature": 0.3}),
    "sampling.noise": ("gaussian", {"engine.soft.noise": "gaussian", "learner.noise": "gaussian"}),
    "sampling.noise_scale": (0.5, {"engine.soft.noise_scale": 0.5, "learner.noise_scale": 0.5}),
    "sampling.noise_clip": ((-1.0, 2.0), {"engine.soft.noise_clip": (-1.0, 2.0), "learner.noise_clip": (-1.0, 2.0)}),
    "sampling.log_epsilon": (1e-3, {"engine.soft.log_epsilon": 1e-3, "learner.log_epsilon": 1e-3}),
    "sampling.answer.temperature": (0.7, {"engine.answer_temperature": 0.7, "learner.answer_temperature": 0.7}),
    "sampling.answer.top_p": (0.7, {"engine.answer_top_p": 0.7}),
    "sampling.answer.top_k": (9, {"engine.answer_top_k": 9}),
    "sampling.max_new_tokens": (
        77,
        {
            "engine.max_new_tokens": 77,
            "engine.thinking_budget": 77,
            "engine.max_model_len": 1024 + 77,
            "learner.max_new_tokens": 77,
        },
    ),
    "sampling.max_thinking_tokens": (11, {"engine.thinking_budget": 11}),
    "sampling.eos_while_thinking": ("forbid", {"engine.eos_while_thinking": "forbid"}),
    "sampling.entropy_stop": (0.5, {"engine.entropy_stop": 0.5}),
    "sampling.entropy_stop_steps": (3, {"engine.entropy_stop_steps": 3}),
    "algorithm.likelihood": (
        "censored",
        {"learner.likelihood": "censored", "learner.censor_delta": 1e-3, "engine.soft.censor_delta": 1e-3},
    ),
    "algorithm.prompts_per_step": (8, {"engine_options.max_concurrency": 1000 + 3 * 8}),
    "algorithm.kl.coefficient": (0.5, {"learner.kl_coefficient": 0.5}),
    "algorithm.kl.estimator": ("exact", {"learner.kl_estimator": "exact"}),
    "algorithm.kl.refresh_every": (3, {"learner.kl_refresh_every": 3}),
    "rollout.kv_cache_memory_mb": (5, {"engine.kv_cache_memory_bytes": 5 * 2**20}),
    "rollout.tensor_parallel_size": (
        2,
        {
            "engine.tensor_parallel_size": 2,
            "engine_options.runtime_env.env_vars.VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        },
    ),
    "rollout.num_cpus": (3, {"engine.num_threads": 3, "engine_options.num_cpus": 3, f"engine_options.{OMP}": "3"}),
    "learner.num_cpus": (3, {"learner_options.num_cpus": 3, f"learner_options.{OMP}": "3"}),
    "learner.num_gpus": (1, {"learner.device": "cuda", "learner_options.num_gpus": 1}),
    "reward.num_cpus": (2, {"verifier_options.num_cpus": 2}),
    "reward.processes_per_actor": (3, {"verifier.processes": 3, "verifier_options.max_concurrency": 4}),
    "pipeline.max_staleness": (5, {"engine_options.max_concurrency": 1000 + 6 * 64}),
    "pipeline.transport": ("delta", {"engine.transport": "delta", "learner.transport": "delta"}),
    "pipeline.shard_mb": (3, {"learner.shard_bytes": 3 * 2**20}),
    "pipeline.sync_timeout_s": (9.0, {"learner.sync_timeout_s": 9.0}),
}
"""Keys that arrive under other names, or in several places."""

CASES = [
    *(
        (key, value, {f"{SECTION_OF[key.split('.')[0]]}.{key.split('.')[1]}": value})
        for key, value in SAME_NAME.items()
    ),
    *((key, value, expected) for key, (value, expected) in ELSEWHERE.items()),
]
NOT_FOR_SPECS = {"algorithm.kl", "algorithm.group_size"}


def plan(changes: dict[str, Any] | None = None, version: int = 0, **facts: Any) -> Plan:
    """The plan of a recipe with some keys (with dots) changed."""
    tree = deepcopy(TREE)
    for key, value in (changes or {}).items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    model: Any = SimpleNamespace(vocab_size=64)
    return make_plan(
        Resolved(parse_config(tree, "test"), Path("m"), model, None, 4, None, (), (), ()), version, **facts
    )


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dots in its keys."""
    if not isinstance(value, dict):
        return {name: value}
    return {at: leaf for key, part in value.items() for at, leaf in flat(part, f"{name}.{key}".lstrip(".")).items()}


def what_changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The places of the plan that these changes of the recipe move, with what stands there now."""
    before, after = flat(asdict(plan())), flat(asdict(plan(changes)))
    return {name: after.get(name) for name in before | after if before.get(name) != after.get(name)}


@pytest.mark.parametrize(("key", "value", "expected"), CASES, ids=[key for key, *_ in CASES])
def test_a_key_arrives_where_it_is_used_and_nowhere_else(key: str, value: Any, expected: dict[str, Any]) -> None:
    assert what_changed({key: value}) == expected


@pytest.mark.parametrize(("section", "keys"), [("learner", LearnerConfig), ("algorithm", AlgorithmConfig)])
def test_no_key_is_forgotten_here(section: str, keys: Any) -> None:
    tried = {key for key, *_ in CASES}
    assert {f"{section}.{name}" for name in keys.model_fields} - NOT_FOR_SPECS <= tried


def test_gpus_decide_the_device() -> None:
    changed = what_changed({"rollout.num_gpus": 1, "rollout.tensor_parallel_size": 2})
    assert changed["engine.device"] == "cuda"
    assert changed["engine.enforce_eager"] is False
    assert changed["engine_options.num_gpus"] == 2
    eager = plan({"rollout.num_gpus": 1, "rollout.enforce_eager": True})
    assert eager.engine.enforce_eager is True


def test_pools_that_share_a_gpu_take_turns() -> None:
    shared = {"rollout.num_gpus": 0.5, "learner.num_gpus": 0.5}
    alternating = plan(shared | {"pipeline.max_staleness": 0})
    assert alternating.engine.sleeps and alternating.learner.shares_device
    assert not plan(shared).engine.sleeps and not plan(shared).learner.shares_device
    assert alternating.engine_options["num_gpus"] == 0.5


def test_what_was_resolved_arrives_too() -> None:
    known = plan()
    assert (known.engine.model_path, known.learner.model_path) == ("m", "m")
    assert (known.engine.end_of_thinking_id, known.learner.expected_vocab_size) == (4, 64)
    assert plan(version=3).engine.initial_version == 3
    options_of = {
        "rollout": known.engine_options,
        "learner": known.learner_options,
        "verifier": known.verifier_options,
    }
    for name, options in options_of.items():
        environment = options["runtime_env"]["env_vars"]
        assert (environment[POOL_VARIABLE], environment["OMP_NUM_THREADS"]) == (name, "1")
        assert (options["max_restarts"], options["max_task_retries"]) == (0, 0), "the pools replace actors themselves"
        assert "label_selector" not in options
    assert plan(labelled=frozenset({"learner"})).learner_options["label_selector"] == {"rl/pool": "learner"}


@pytest.mark.parametrize(("max_staleness", "prompts_per_step"), [(0, 4), (1, 2048), (4, 4096)])
def test_a_ping_never_queues_behind_groups(max_staleness: int, prompts_per_step: int) -> None:
    """All outstanding groups may lie on one actor, each in a call of its own."""
    changed = {"pipeline.max_staleness": max_staleness, "algorithm.prompts_per_step": prompts_per_step}
    assert plan(changed).engine_options["max_concurrency"] >= (max_staleness + 1) * prompts_per_step + 500


def test_greedy_decoding_can_be_planned() -> None:
    """An evaluation starts no learner, and its plan is made of the same recipe."""
    assert plan({"sampling.temperature": 0, "sampling.answer.temperature": 0}).engine.answer_temperature == 0
