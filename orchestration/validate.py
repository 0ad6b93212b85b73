"""Everything that can be known about a run before any actor starts.

`validate` resolves data, model directory, tokenizer, end of thinking, gold answers and pool sizes. What is wrong is a
`ConfigError` with one message; what is merely absent (a model or dataset of the hub that is not in the local cache) is
listed in `Resolved.missing`, so that a recipe can be checked on a laptop. Nothing here starts a process or imports
torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestration import machine
from orchestration.config import Config, ConfigError
from orchestration.config_rules import beyond_success_rates, untrainable
from orchestration.config_sections import DatasetConfig, RewardConfig
from orchestration.dataset import MissingData, PromptRow, dataset_name, place, read_rows, report_bad_rows
from orchestration.model_facts import ModelFacts, read_model_facts
from orchestration.prompt_tokenizer import (
    PromptTokenizer,
    end_of_thinking_id,
    resolve_model_dir,
    with_recipe_prompt,
)
from orchestration.user_rule import check_user_rule
from reward.audit import audit_gold
from reward.rules import RuleError, parse_rule
from reward.verifier import VerifierSpec
from rollout.vllm_soft import ARCHITECTURES


@dataclass(frozen=True, slots=True)
class PromptSet:
    """One dataset, ready to be issued."""

    name: str
    rows: tuple[PromptRow, ...]
    prompt_ids: dict[str, tuple[int, ...]]
    """prompt_id -> token ids with the generation prompt; empty where the tokenizer is missing."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration together with what it refers to."""

    config: Config
    model_dir: Path | None
    model: ModelFacts | None
    tokenizer: PromptTokenizer | None
    end_of_thinking_id: int | None
    """None while the tokenizer is missing, and for `thinking: discrete` with a model that has no such token."""
    train: PromptSet | None
    evaluation: tuple[PromptSet, ...]
    warnings: tuple[str, ...]
    missing: tuple[str, ...]
    """What has to be fetched before a run can start."""

    def require_complete(self) -> Resolved:
        """Raise `ConfigError` if anything is missing; a run calls this, `softgrpo validate` does not."""
        if self.missing:
            raise ConfigError("\n".join(self.missing))
        return self


@dataclass(frozen=True, slots=True)
class PoolNeeds:
    """Ray resources that the three pools ask for."""

    rollout_cpus: float
    reward_cpus: float
    learner_cpus: float
    rollout_gpus: float
    learner_gpus: float

    @property
    def cpus(self) -> float:
        """All logical CPUs."""
        return self.rollout_cpus + self.reward_cpus + self.learner_cpus

    @property
    def gpus(self) -> float:
        """All GPUs."""
        return self.rollout_gpus + self.learner_gpus


def require_trainable(config: Config) -> None:
    """Raise `ConfigError` for settings that decode and do not train."""
    _raise_any(untrainable(config))


def _raise_any(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def validate(config: Config, *, trains: bool = True) -> Resolved:
    """Resolve and check a configuration; raises `ConfigError` for what is wrong.

    `trains` is False for an evaluation: it may decode in ways that cannot be trained.
    """
    if trains:
        require_trainable(config)
    _check_names(config)
    missing: list[str] = []
    warnings: list[str] = list(check_pools(config))
    model_dir = resolve_model_dir(config.model)
    model, tokenizer, end_id = None, None, None
    if model_dir is None:
        missing.append(
            f"model.path={config.model.path}: not in the local cache; fetch it with `hf download {config.model.path}`"
        )
    else:
        model = read_model_facts(model_dir)
        if not model.has_weights:
            missing.append(f"model.path={model_dir}: no weights (*.safetensors); the rest of the checkpoint is there")
        tokenizer = PromptTokenizer(model_dir)
        tokenizer.require_chat_template()
        end_id = _check_end_of_thinking(config, model, tokenizer, warnings, trains)
        _check_engine(config, model)
        _check_lengths(config, model)
    train = _load(config, config.data.train, tokenizer, missing)
    loaded = [_load(config, dataset, tokenizer, missing) for dataset in config.data.evaluation]
    evaluation = tuple(prompts for prompts in loaded if prompts is not None)
    rules = {row.rule for prompts in (train, *evaluation) if prompts is not None for row in prompts.rows}
    if config.reward.user_rule and any(term.name == "user" for rule in rules for term in parse_rule(rule)):
        check_user_rule(config.reward.user_rule)
    if trains and train is not None and config.algorithm.advantage == "bnpo":
        _raise_any(beyond_success_rates({row.rule for row in train.rows}))
    if train is not None and len(train.rows) < config.algorithm.prompts_per_step:
        warnings.append(
            f"data.train has {len(train.rows)} prompts for steps of {config.algorithm.prompts_per_step}: a step visits "
            "some of them more than once"
        )
    return Resolved(config, model_dir, model, tokenizer, end_id, train, evaluation, tuple(warnings), tuple(missing))


def _check_names(config: Config) -> None:
    """Answers and metrics of an evaluation set are kept under its name."""
    paths: dict[str, str] = {}
    for dataset in config.data.evaluation:
        name = dataset_name(dataset)
        if name in paths:
            raise ConfigError(
                f"data.evaluation: {paths[name]} and {dataset.path} are both named {name}, and one would overwrite the "
                "other; give each a `name` of its own (`--benchmark NAME=FILE`)"
            )
        paths[name] = dataset.path


def pool_needs(config: Config) -> PoolNeeds:
    """The resources of the plan."""
    rollout, reward, learner = config.rollout, config.reward, config.learner
    gpus_per_engine = rollout.num_gpus
    if rollout.num_gpus >= 1:
        gpus_per_engine = max(rollout.num_gpus, rollout.tensor_parallel_size)
    return PoolNeeds(
        rollout_cpus=rollout.num_actors * rollout.num_cpus,
        reward_cpus=reward.num_actors * reward.num_cpus,
        learner_cpus=learner.world_size * learner.num_cpus,
        rollout_gpus=rollout.num_actors * gpus_per_engine,
        learner_gpus=learner.world_size * learner.num_gpus,
    )


def uses_local_cluster(config: Config) -> bool:
    """True where the run starts its own Ray on this machine."""
    return config.cluster.address is None and not os.environ.get("RAY_ADDRESS")


def check_pools(config: Config) -> Iterable[str]:
    """Compare the plan with this machine; yields warnings and raises `ConfigError` for what can never be placed.

    A plan for an existing cluster is compared with that cluster when the run starts.
    """
    if not uses_local_cluster(config):
        return
    needs = pool_needs(config)
    available = machine.num_gpus()
    if needs.gpus > available:
        raise ConfigError(
            f"rollout.num_actors={config.rollout.num_actors} x {needs.rollout_gpus / config.rollout.num_actors:g} and "
            f"learner.world_size={config.learner.world_size} x {config.learner.num_gpus:g} ask for {needs.gpus:g} "
            f"GPUs, this machine has {available}; lower them, or set cluster.address=auto to use a running Ray cluster"
        )
    if config.cluster.local_cpus is not None and needs.cpus > config.cluster.local_cpus:
        raise ConfigError(
            f"cluster.local_cpus={config.cluster.local_cpus}, but the pools ask for {needs.cpus:g} (rollout "
            f"{needs.rollout_cpus:g}, reward {needs.reward_cpus:g}, learner {needs.learner_cpus:g}); raise it or "
            "leave it out"
        )
    if needs.cpus > machine.num_cpus():
        yield f"the pools ask for {needs.cpus:g} CPUs on a machine with {machine.num_cpus()}: actors will share them"


def _check_end_of_thinking(
    config: Config, model: ModelFacts, tokenizer: PromptTokenizer, warnings: list[str], trains: bool
) -> int | None:
    if tokenizer.size > model.vocab_size:
        raise ConfigError(
            f"model.path={config.model.path}: the tokenizer has ids up to {tokenizer.size - 1}, the embedding only "
            f"{model.vocab_size} rows; use the tokenizer that was saved with the model"
        )
    try:
        end_id = end_of_thinking_id(config.model, tokenizer, model.vocab_size, trains=trains)
    except ConfigError:
        if config.sampling.thinking == "discrete":
            return None
        raise
    if isinstance(config.model.end_of_thinking, int) and tokenizer.is_ordinary(end_id):
        warnings.append(
            f"model.end_of_thinking: id {end_id} ({tokenizer.token(end_id)!r}) is an ordinary token; thinking ends "
            "wherever the model writes it"
        )
    return end_id


def _check_engine(config: Config, model: ModelFacts) -> None:
    if model.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"model.path={config.model.path}: the architecture {model.architecture} is not among "
            f"{', '.join(ARCHITECTURES)}; choose a model of these, or add it to rollout/vllm_soft.py"
        )
    ranks = config.rollout.tensor_parallel_size
    if model.num_heads % ranks:
        raise ConfigError(
            f"rollout.tensor_parallel_size={ranks} does not divide the {model.num_heads} attention heads of "
            f"{config.model.path}; choose a divisor"
        )


def _check_lengths(config: Config, model: ModelFacts) -> None:
    if config.max_model_len > model.max_positions:
        raise ConfigError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + sampling.max_new_tokens="
            f"{config.sampling.max_new_tokens} = {config.max_model_len} exceeds the {model.max_positions} positions of "
            f"{config.model.path}; lower one of them"
        )
    cache_mb = config.rollout.kv_cache_memory_mb
    sequence_mb = config.max_model_len * model.kv_bytes_per_token(_value_bytes(config)) / 2**20
    if cache_mb is not None and sequence_mb > cache_mb:
        raise ConfigError(
            f"rollout.kv_cache_memory_mb={cache_mb} does not hold one sequence of {config.max_model_len} tokens "
            f"({sequence_mb:.0f} MB); raise it"
        )


def _load(
    config: Config, dataset: DatasetConfig, tokenizer: PromptTokenizer | None, missing: list[str]
) -> PromptSet | None:
    try:
        rows, problems = read_rows(dataset, config.reward)
    except MissingData as absent:
        missing.append(str(absent))
        return None
    rows, bad_golds = _with_checkable_gold(rows, dataset, config.reward)
    prompt_ids, too_long = _encode(config, dataset, rows, tokenizer) if tokenizer else ({}, [])
    report_bad_rows([*problems, *bad_golds, *too_long], config.data.max_bad_rows)
    if tokenizer:
        rows = [row for row in rows if row.prompt_id in prompt_ids]
    if not rows:
        raise ConfigError(f"{dataset.path}: no usable rows; give a file with at least one prompt and its answer")
    return PromptSet(dataset_name(dataset), tuple(rows), prompt_ids)


def _encode(
    config: Config, dataset: DatasetConfig, rows: Sequence[PromptRow], tokenizer: PromptTokenizer
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Prompt ids of the rows that fit, and one message for each that does not."""
    limit = config.data.max_prompt_tokens
    prompt_ids: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    chats = [with_recipe_prompt(row.messages, config.data) for row in rows]
    for row, ids in zip(rows, tokenizer.encode_chats(chats), strict=True):
        if len(ids) <= limit:
            prompt_ids[row.prompt_id] = ids
        else:
            problems.append(
                f"{place(dataset.path, row.line)}: the prompt has {len(ids)} tokens, the limit is "
                f"data.max_prompt_tokens={limit}: {row.messages[-1]['content'][:60]!r}"
            )
    return prompt_ids, problems


def _with_checkable_gold(
    rows: Sequence[PromptRow], dataset: DatasetConfig, reward: RewardConfig
) -> tuple[list[PromptRow], list[str]]:
    """Split off rows whose gold answer no response could match by their rule; killable children try the mathematics."""
    spec = VerifierSpec(min(8, os.cpu_count() or 1), reward.deadline_s, reward.memory_mb, reward.user_rule)
    try:
        reasons = audit_gold([row.gold for row in rows], [row.rule for row in rows], spec)
    except RuleError as error:
        raise ConfigError(f"{dataset.path}: {error} (reward.rules, or rule of the dataset)") from None
    good, problems = [], []
    for row, reason in zip(rows, reasons, strict=True):
        if reason is None:
            good.append(row)
        else:
            problems.append(
                f"{place(dataset.path, row.line)}: gold answer {row.gold!r:.80}: {reason} (rule {row.rule}; "
                f"reward.rules.{row.data_source} chooses another)"
            )
    return good, problems


def _value_bytes(config: Config) -> int:
    return 4 if config.model.dtype == "float32" else 2
