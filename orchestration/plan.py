"""From a resolved configuration to what each pool is told: specs (plain data) and Ray options."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.spec import LearnerSpec
from orchestration.config import Config
from orchestration.logs import POOL_VARIABLE, RANK_VARIABLE
from orchestration.validate import Resolved
from reward.actor import VerifierSpec
from rollout.engine import EngineSpec, engine_environment

SOURCE_ROOT = Path(__file__).resolve().parent.parent
OTHER_CALLS = 1000
"""Concurrent calls that a rollout actor takes beside those of training groups: evaluation, pings, weights, aborts."""


POOL_LABEL = "rl/pool"
"""Node label with the pool that a node is for; nodes without it take anything."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Specs and Ray actor options of the three pools."""

    engine: EngineSpec
    learner: LearnerSpec
    verifier: VerifierSpec
    engine_options: dict[str, Any]
    learner_options: dict[str, Any]
    verifier_options: dict[str, Any]


def make_plan(resolved: Resolved, initial_version: int, labelled: frozenset[str] = frozenset()) -> Plan:
    """What to start for this configuration; `resolved` must be complete.

    A pool named in `labelled` goes to the nodes with the label `rl/pool: <pool>` only; the others wherever they fit.
    """
    config = resolved.config
    engine = engine_spec(resolved, initial_version)
    return Plan(
        engine=engine,
        learner=learner_spec(resolved),
        verifier=verifier_spec(config),
        engine_options={
            **_resources(config.rollout.num_cpus, engine_gpus(config)),
            **_on_nodes_of("rollout", labelled),
            # No ping may queue behind groups, which may all lie on one actor once the others are lost.
            "max_concurrency": OTHER_CALLS + (config.pipeline.max_staleness + 1) * config.algorithm.prompts_per_step,
            "runtime_env": {"env_vars": {**source_path(), POOL_VARIABLE: "rollout", **engine_environment(engine)}},
        },
        learner_options={
            **_resources(config.learner.num_cpus, config.learner.num_gpus),
            **_on_nodes_of("learner", labelled),
            "runtime_env": {
                "env_vars": {**source_path(), POOL_VARIABLE: "learner", **_threads(config.learner.num_cpus)}
            },
        },
        verifier_options={
            **_resources(config.reward.num_cpus, 0),
            **_on_nodes_of("verifier", labelled),
            "max_concurrency": config.reward.processes_per_actor + 1,
            "runtime_env": {"env_vars": {**source_path(), POOL_VARIABLE: "verifier", **_threads(1)}},
        },
    )


def as_member(options: dict[str, Any], index: int) -> dict[str, Any]:
    """Ray options of one pool member: its log lines carry its index."""
    environment = {**options["runtime_env"]["env_vars"], RANK_VARIABLE: str(index)}
    return {**options, "runtime_env": {**options["runtime_env"], "env_vars": environment}}


def engine_gpus(config: Config) -> float:
    """Ray GPUs of one engine: whole GPUs follow the tensor-parallel size."""
    gpus = config.rollout.num_gpus
    return max(gpus, config.rollout.tensor_parallel_size) if gpus >= 1 else gpus


def engine_spec(resolved: Resolved, initial_version: int) -> EngineSpec:
    """What a rollout actor needs to know."""
    config, sampling, rollout = resolved.config, resolved.config.sampling, resolved.config.rollout
    return EngineSpec(
        model_path=str(resolved.model_dir),
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        seed=config.seed,
        device="cuda" if rollout.num_gpus else "cpu",
        num_threads=max(1, int(rollout.num_cpus)),
        tensor_parallel_size=rollout.tensor_parallel_size,
        max_num_seqs=rollout.max_num_seqs,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        kv_cache_memory_bytes=rollout.kv_cache_memory_mb and rollout.kv_cache_memory_mb * 2**20,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=rollout.enforce_eager or rollout.num_gpus == 0,
        end_of_thinking_id=resolved.end_of_thinking_id,
        soft={
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "gumbel_temperature": sampling.gumbel_temperature,
            "noise": sampling.noise,
            "noise_scale": sampling.noise_scale,
            "noise_clip": sampling.noise_clip,
            "max_candidates": sampling.top_k,
            "censor_delta": config.censor_delta,
            "log_epsilon": sampling.log_epsilon,
        },
        answer_temperature=sampling.answer.temperature,
        answer_top_p=sampling.answer.top_p,
        answer_top_k=sampling.answer.top_k,
        max_new_tokens=sampling.max_new_tokens,
        thinking_budget=config.thinking_budget,
        eos_while_thinking=sampling.eos_while_thinking,
        entropy_stop=sampling.entropy_stop,
        entropy_stop_steps=sampling.entropy_stop_steps,
        transport=config.pipeline.transport,
        initial_version=initial_version,
        sleeps=config.alternates,
    )


def learner_spec(resolved: Resolved) -> LearnerSpec:
    """What a learner rank needs to know."""
    config = resolved.config
    algorithm, learner, sampling = config.algorithm, config.learner, config.sampling
    return LearnerSpec(
        model_path=str(resolved.model_dir),
        total_steps=config.steps,
        world_size=learner.world_size,
        device="cuda" if learner.num_gpus else "cpu",
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        expected_vocab_size=resolved.model.vocab_size if resolved.model else None,
        seed=config.seed,
        zero_stage=learner.zero_stage,
        offload_optimizer=learner.offload_optimizer,
        gradient_checkpointing=learner.gradient_checkpointing,
        lora_rank=learner.lora_rank,
        learning_rate=learner.learning_rate,
        lr_schedule=learner.lr_schedule,
        warmup_steps=learner.warmup_steps,
        weight_decay=learner.weight_decay,
        betas=learner.betas,
        max_grad_norm=learner.max_grad_norm,
        micro_batch_tokens=learner.micro_batch_tokens,
        mini_batches=algorithm.mini_batches,
        epochs=algorithm.epochs,
        likelihood=algorithm.likelihood,
        old_log_density=algorithm.old_log_density,
        advantage=algorithm.advantage,
        policy_loss=algorithm.policy_loss,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        aggregation=algorithm.aggregation,
        importance_cap=algorithm.importance_cap,
        entropy_bonus=algorithm.entropy_bonus,
        max_new_tokens=sampling.max_new_tokens,
        differentiate_soft_inputs=learner.differentiate_soft_inputs,
        kl_coefficient=algorithm.kl.coefficient,
        kl_estimator=algorithm.kl.estimator,
        kl_refresh_every=algorithm.kl.refresh_every,
        temperature=sampling.temperature,
        answer_temperature=sampling.answer.temperature,
        noise=sampling.noise,
        noise_scale=sampling.noise_scale,
        noise_clip=sampling.noise_clip,
        log_epsilon=sampling.log_epsilon,
        gumbel_temperature=sampling.gumbel_temperature,
        censor_delta=config.censor_delta,
        max_candidates=sampling.top_k,
        transport=config.pipeline.transport,
        shard_bytes=config.pipeline.shard_mb * 2**20,
        collective_timeout_s=learner.collective_timeout_s,
        startup_timeout_s=learner.startup_timeout_s,
        step_timeout_s=learner.step_timeout_s,
        shares_device=config.alternates,
        sync_timeout_s=config.pipeline.sync_timeout_s,
    )


def verifier_spec(config: Config) -> VerifierSpec:
    """What a verifier actor needs to know."""
    reward = config.reward
    return VerifierSpec(
        processes=reward.processes_per_actor,
        deadline_s=reward.deadline_s,
        memory_mb=reward.memory_mb,
        user_rule=reward.user_rule,
        failure_alarm=reward.failure_alarm,
    )


def _resources(num_cpus: float, num_gpus: float) -> dict[str, Any]:
    return {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0, "max_task_retries": 0}


def _on_nodes_of(pool: str, labelled: frozenset[str]) -> dict[str, Any]:
    return {"label_selector": {POOL_LABEL: pool}} if pool in labelled else {}


def _threads(num_cpus: float) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(max(1, int(num_cpus)))}


def source_path() -> dict[str, str]:
    """Workers of a local cluster import this checkout; those of a submitted job have it as their working directory."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(SOURCE_ROOT), os.environ.get("PYTHONPATH", "")]))}
