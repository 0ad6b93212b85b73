"""The derived facts of a resolved run, as text for people."""

from __future__ import annotations

from orchestration import machine
from orchestration.config import Config
from orchestration.model_facts import ModelFacts
from orchestration.validate import PromptSet, Resolved, pool_needs, uses_local_cluster

CANDIDATE_BYTES = 16
"""Of a soft position: id, behaviour log-prob, noise and weight of a candidate, 4 bytes each."""
POSITION_BYTES = 8
"""Of any position: id and log-prob, or log-density and censoring threshold."""


def describe(resolved: Resolved) -> str:
    """What the run will be: model, data, pools, derived numbers, then warnings and what is missing."""
    config = resolved.config
    facts = {
        "run": f"{config.name} -> {config.run_dir}, {config.steps} steps, seed {config.seed}",
        "model": _describe_model(resolved),
        "end of thinking": "unknown" if resolved.end_of_thinking_id is None else f"id {resolved.end_of_thinking_id}",
        "train data": _describe_prompts(resolved.train),
        **{f"evaluation {prompts.name}": _describe_prompts(prompts) for prompts in resolved.evaluation},
        **_describe_plan(config),
        **_describe_step(config),
        **(_describe_memory(config, resolved.model) if resolved.model else {}),
    }
    width = max(len(name) for name in facts) + 2
    lines = [f"{name:<{width}}{value}" for name, value in facts.items()]
    lines += [f"warning: {warning}" for warning in resolved.warnings]
    lines += [f"missing: {absent}" for absent in resolved.missing]
    lines.append(f"{config.name}: valid" + (", but something has to be fetched first" if resolved.missing else ""))
    return "\n".join(lines)


def _describe_model(resolved: Resolved) -> str:
    model, path = resolved.model, resolved.config.model.path
    if model is None:
        return f"{path} (not here)"
    return (
        f"{path}: {model.architecture}, {model.num_parameters / 1e6:.4g}M parameters, vocabulary {model.vocab_size}, "
        f"{resolved.config.model.dtype}"
    )


def _describe_prompts(prompts: PromptSet | None) -> str:
    if prompts is None:
        return "(not here)"
    rules = ", ".join(sorted({row.rule for row in prompts.rows}))
    lengths = [len(ids) for ids in prompts.prompt_ids.values()]
    tokens = f", prompts of {min(lengths)} to {max(lengths)} tokens" if lengths else ""
    return f"{prompts.name}: {len(prompts.rows)} prompts{tokens}, rule {rules}"


def _describe_plan(config: Config) -> dict[str, str]:
    needs = pool_needs(config)
    if uses_local_cluster(config):
        have = f"this machine has {machine.num_cpus()} CPUs and {machine.num_gpus()} GPUs"
    else:
        have = "compared with the Ray cluster at start"
    return {
        "pools": f"rollout {config.rollout.num_actors}, verifier {config.reward.num_actors}, "
        f"learner {config.learner.world_size} (ZeRO {zero_stage(config)})",
        "resources": f"{needs.cpus:g} CPUs, {needs.gpus:g} GPUs; {have}",
    }


def _describe_step(config: Config) -> dict[str, str]:
    algorithm, staleness = config.algorithm, config.pipeline.max_staleness
    tokens = config.responses_per_step * config.sampling.max_new_tokens
    soft = config.sampling.thinking == "soft"
    position_bytes = POSITION_BYTES + (CANDIDATE_BYTES * config.sampling.top_k if soft else 0)
    outstanding = config.slots * algorithm.group_size * config.sampling.max_new_tokens * position_bytes
    return {
        "step": f"{algorithm.prompts_per_step} prompts x {algorithm.group_size} responses = "
        f"{config.responses_per_step} responses, at most {tokens:,} tokens, "
        f"{algorithm.mini_batches * algorithm.epochs} optimiser steps",
        "staleness": f"at most {staleness} versions" + (" (synchronous)" if staleness == 0 else ""),
        "slots": f"{config.slots} groups outstanding = ({staleness} + 1) x {algorithm.prompts_per_step}",
        "trajectories": f"at most {_megabytes(tokens * position_bytes)} a step, {_megabytes(outstanding)} outstanding "
        f"({position_bytes} bytes a position)",
    }


def zero_stage(config: Config) -> int:
    """The stage that the learner runs, which has master weights where it needs them (it is not asked: torch)."""
    learner = config.learner
    return max(learner.zero_stage, config.model.dtype == "bfloat16" or learner.offload_optimizer)


def _describe_memory(config: Config, model: ModelFacts) -> dict[str, str]:
    value_bytes = 4 if config.model.dtype == "float32" else 2
    parameters, ranks = model.num_parameters, config.learner.world_size
    engine = parameters * value_bytes / config.rollout.tensor_parallel_size
    sequence = config.max_model_len * model.kv_bytes_per_token(value_bytes)
    stage = zero_stage(config)
    # Two moments, and from stage 1 on master weights.
    optimizer = 12 * parameters / ranks if stage else 8 * parameters
    gradients = 4 * parameters / (ranks if stage >= 2 else 1)
    weights = value_bytes * parameters / (ranks if stage >= 3 else 1)
    reference = value_bytes * parameters / (ranks if stage >= 3 else 1) if config.algorithm.kl.coefficient else 0
    unseen = [name for name in ("offload_optimizer", "lora_rank") if getattr(config.learner, name)]
    less = f" (less by {' and '.join(unseen)})" if unseen else ""
    rank = weights + gradients + optimizer + reference
    return {
        "memory, engine": f"{_megabytes(engine)} weights, {_megabytes(sequence)} keys and values per sequence of "
        f"{config.max_model_len} tokens",
        "memory, learner": f"{_megabytes(rank)} a rank without activations{less}",
        "weight sync": f"{_megabytes(parameters * value_bytes)} a version",
    }


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
