"""Combinations of keys that cannot run, or cannot train, each with keys, values and the fix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestration.redaction import URL_PASSWORD

if TYPE_CHECKING:
    from orchestration.config import Config


def impossible_combinations(config: Config) -> list[str]:
    """One message per combination that no part could run, with keys, values and the fix."""
    sampling, algorithm = config.sampling, config.algorithm
    problems = []
    soft = sampling.thinking == "soft"
    if soft and sampling.censor_delta is not None and algorithm.likelihood != "censored":
        problems.append(
            f"sampling.censor_delta={sampling.censor_delta} with algorithm.likelihood={algorithm.likelihood}: "
            "censoring is executed only for the censored likelihood; remove censor_delta or set likelihood: censored"
        )
    family = {"gaussian": "gaussian", "dirichlet": "dirichlet"}.get(sampling.noise, "gumbel")
    wanted = {"gaussian": "gaussian", "dirichlet": "dirichlet"}.get(algorithm.likelihood, "gumbel")
    if soft and sampling.noise == "none" and algorithm.likelihood not in ("argmax", "none"):
        problems.append(
            f"sampling.noise=none with algorithm.likelihood={algorithm.likelihood}: without noise a soft token has no "
            "density; set noise: gumbel"
        )
    elif soft and algorithm.likelihood not in ("none", "argmax") and family != wanted:
        problems.append(
            f"sampling.noise={sampling.noise} with algorithm.likelihood={algorithm.likelihood}: the likelihood is of "
            f"{wanted} noise; set noise: {wanted} or likelihood: {family if family != 'gumbel' else 'censored'}"
        )
    if soft and sampling.noise_clip is not None and algorithm.likelihood not in ("reference", "argmax", "none"):
        problems.append(
            f"sampling.noise_clip={list(sampling.noise_clip)} with algorithm.likelihood={algorithm.likelihood}: "
            "clipped noise has no such density; remove noise_clip (only likelihood: reference uses it)"
        )
    if sampling.noise_clip is not None and sampling.noise_clip[0] >= sampling.noise_clip[1]:
        problems.append(f"sampling.noise_clip={list(sampling.noise_clip)}: give [low, high] with low < high")
    if algorithm.importance_cap is not None and algorithm.old_log_density == "behaviour":
        problems.append(
            f"algorithm.importance_cap={algorithm.importance_cap} with old_log_density=behaviour: the ratio already "
            "starts from the engine, the correction would count the gap twice; remove importance_cap or set "
            "old_log_density: recompute"
        )
    if sampling.max_thinking_tokens and sampling.max_thinking_tokens >= sampling.max_new_tokens:
        problems.append(
            f"sampling.max_thinking_tokens={sampling.max_thinking_tokens} leaves no room for an answer in "
            f"max_new_tokens={sampling.max_new_tokens}; set it lower, or leave it out"
        )
    if algorithm.prompts_per_step % algorithm.mini_batches:
        problems.append(
            f"algorithm.prompts_per_step={algorithm.prompts_per_step} is not divisible by "
            f"mini_batches={algorithm.mini_batches}; groups are not split between optimiser steps"
        )
    responses_per_mini_batch = config.responses_per_step // algorithm.mini_batches
    if responses_per_mini_batch < config.learner.world_size:
        problems.append(
            f"learner.world_size={config.learner.world_size} exceeds the {responses_per_mini_batch} responses of a "
            "mini-batch; lower world_size or mini_batches, or raise prompts_per_step"
        )
    if config.tracking.mlflow_uri and URL_PASSWORD.search(config.tracking.mlflow_uri):
        problems.append(
            "tracking.mlflow_uri holds a password, and the configuration is saved with the run: put it into "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if config.pipeline.transport == "nccl" and min(config.learner.num_gpus, config.rollout.num_gpus) < 1:
        problems.append(
            f"pipeline.transport=nccl with learner.num_gpus={config.learner.num_gpus:g} and rollout.num_gpus="
            f"{config.rollout.num_gpus:g}: NCCL joins whole GPUs, no CPU and no GPU that two actors share; set both to "
            "at least 1 or transport: object_store"
        )
    if 0 < config.learner.num_gpus < 1 < config.learner.world_size:
        problems.append(
            f"learner.num_gpus={config.learner.num_gpus:g} with learner.world_size={config.learner.world_size}: ranks "
            "that share a GPU would get the same one, and NCCL joins no two there; set learner.num_gpus: 1, or "
            "world_size: 1"
        )
    if config.rollout.num_gpus and config.rollout.num_gpus < 1 and config.rollout.tensor_parallel_size > 1:
        problems.append(
            f"rollout.num_gpus={config.rollout.num_gpus} with tensor_parallel_size="
            f"{config.rollout.tensor_parallel_size}: a fractional GPU cannot be tensor-parallel; set num_gpus to "
            f"{config.rollout.tensor_parallel_size}"
        )
    return problems


def untrainable(config: Config) -> list[str]:
    """One message per setting that decodes and does not train: greedy tokens have no density to score."""
    sampling = config.sampling
    problems = []
    if sampling.answer.temperature == 0:
        problems.append(
            "sampling.answer.temperature=0: training scores tokens at the temperature that they were drawn at; set a "
            "positive one (`softgrpo evaluate` and `softgrpo generate` take 0)"
        )
    if sampling.thinking == "soft" and sampling.temperature == 0:
        problems.append(
            "sampling.temperature=0 with thinking: soft: training needs noise and scores it at this temperature; set a "
            "positive one (`softgrpo evaluate` and `softgrpo generate` take 0)"
        )
    return problems
