"""Combinations of keys that cannot run, or cannot train, each with keys, values and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from orchestration.redaction import URL_PASSWORD

if TYPE_CHECKING:
    from orchestration.config import Config


REFERENCE_SAMPLING: dict[str, float | tuple[float, float]] = {
    "noise_clip": (-1.5, 3.0),
    "log_epsilon": 1e-6,
    "noise_scale": 1.0,
}
"""What `learner.likelihood` takes for granted in `reference` (it is not asked: it imports torch)."""

REWARDS = {"length": (-1.0, 0.0)}
"""Ends of what a rule may say; of any other it is 0 to 1."""


def impossible_combinations(config: Config) -> list[str]:
    """One message per combination that no part could run, with keys, values and the fix."""
    sampling, algorithm = config.sampling, config.algorithm
    problems = []
    if sampling.noise_clip is not None and sampling.noise_clip[0] >= sampling.noise_clip[1]:
        problems.append(f"sampling.noise_clip={list(sampling.noise_clip)}: give [low, high] with low < high")
    if sampling.thinking == "soft" and sampling.censor_delta is not None and algorithm.likelihood != "censored":
        problems.append(
            f"sampling.censor_delta={sampling.censor_delta} with algorithm.likelihood={algorithm.likelihood}: "
            "censoring is executed only for the censored likelihood; remove censor_delta or set likelihood: censored"
        )
    if sampling.thinking == "soft" and algorithm.likelihood not in ("argmax", "none"):
        problems += _noise_of_another(config)
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


def _noise_of_another(config: Config) -> list[str]:
    """Soft tokens whose noise is not that of the likelihood."""
    sampling, likelihood = config.sampling, config.algorithm.likelihood
    problems = []
    wanted = likelihood if likelihood in ("gaussian", "dirichlet") else "gumbel"
    if sampling.noise == "none":
        problems.append(
            f"sampling.noise=none with algorithm.likelihood={likelihood}: without noise a soft token has no density; "
            "set noise: gumbel"
        )
    elif sampling.noise != wanted:
        other = "censored" if sampling.noise == "gumbel" else sampling.noise
        problems.append(
            f"sampling.noise={sampling.noise} with algorithm.likelihood={likelihood}: the likelihood is of {wanted} "
            f"noise; set noise: {wanted} or likelihood: {other}"
        )
    if sampling.noise_clip is not None and likelihood != "reference":
        problems.append(
            f"sampling.noise_clip={list(sampling.noise_clip)} with algorithm.likelihood={likelihood}: clipped noise "
            "has no such density; remove noise_clip (only likelihood: reference uses it)"
        )
    return problems


def _without_density(config: Config) -> list[str]:
    """Soft tokens drawn in a way that the likelihood is not the density of; without one (`none`) all will do."""
    sampling, likelihood = config.sampling, config.algorithm.likelihood
    problems = _noise_of_another(config) if likelihood == "argmax" else []
    if sampling.log_epsilon and likelihood not in ("none", "reference"):
        problems.append(
            f"sampling.log_epsilon={sampling.log_epsilon:g} with algorithm.likelihood={likelihood}: candidates that "
            "were filtered out would enter the mixture, and the likelihood leaves them out; remove log_epsilon (only "
            "likelihood: reference uses it)"
        )
    return problems + (_other_than_released(config) if likelihood == "reference" else [])


def _other_than_released(config: Config) -> list[str]:
    """`reference` repeats the released code: its scores are those of one way to draw and to compare."""
    sampling, algorithm = config.sampling, config.algorithm
    found = {name: getattr(sampling, name) for name in REFERENCE_SAMPLING}
    problems = []
    if found != REFERENCE_SAMPLING:
        given = ", ".join(f"sampling.{name}={_shown(value)}" for name, value in found.items())
        wanted = ", ".join(f"{name}: {_shown(value)}" for name, value in REFERENCE_SAMPLING.items())
        problems.append(
            f"algorithm.likelihood=reference with {given}: it scores soft tokens as the released code draws them, "
            f"whatever was drawn; set {wanted}, or another likelihood"
        )
    starts_at_engine = {
        "old_log_density=behaviour": algorithm.old_log_density == "behaviour",
        f"importance_cap={algorithm.importance_cap}": algorithm.importance_cap is not None,
    }
    problems += [
        f"algorithm.likelihood=reference with {what}: the engine's record leaves out the probability of filtered "
        "candidates, which this likelihood counts: the ratio would not start from 1; set old_log_density: recompute "
        "and no importance_cap, or another likelihood"
        for what, asked in starts_at_engine.items()
        if asked
    ]
    return problems


def _shown(value: float | tuple[float, float] | None) -> str:
    if isinstance(value, tuple):
        return f"[{value[0]:g}, {value[1]:g}]"
    return "null" if value is None else f"{value:g}"


def untrainable(config: Config) -> list[str]:
    """One message per setting that decodes and does not train: what was drawn has no density, or another one."""
    sampling = config.sampling
    problems = _without_density(config) if sampling.thinking == "soft" else []
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


def beyond_success_rates(rules: Iterable[str]) -> list[str]:
    """One message per rule whose rewards can leave [0, 1], which `advantage: bnpo` cannot take.

    What a user's own rule returns is not known here.
    """
    from reward.rules import parse_rule

    problems = []
    for rule in sorted(rules):
        terms = parse_rule(rule)
        ends = [sorted(term.weight * reward for reward in REWARDS.get(term.name, (0.0, 1.0))) for term in terms]
        low, high = sum(low for low, _ in ends), sum(high for _, high in ends)
        if (low < 0 or high > 1) and all(term.name != "user" for term in terms):
            problems.append(
                f"algorithm.advantage=bnpo with the rule {rule!r}: it models success rates in [0, 1], and these "
                f"rewards go from {low:g} to {high:g}; change the weights in reward.rules, or set advantage: grpo"
            )
    return problems
