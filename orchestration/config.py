"""The typed configuration tree: one YAML file plus `key=value` overrides, validated once, frozen, saved resolved.

Unknown keys, wrong types and impossible combinations are errors that name the key, the value and the fix.
Nothing here imports torch, vllm, deepspeed or transformers: `--help` and configuration errors are instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from orchestration import strict_yaml
from orchestration.config_rules import impossible_combinations
from orchestration.config_sections import (
    AlgorithmConfig,
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EvaluationConfig,
    LearnerConfig,
    ModelConfig,
    PipelineConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    Section,
    TrackingConfig,
)
from orchestration.redaction import HIDDEN, SECRET_NAME, redact

DEFAULT_CENSOR_DELTA = 1e-3
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, the value and the fix."""


class Config(Section):
    """One run."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    output_dir: str | None = None
    """Run directory; None: outputs/<name> under the working directory."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    steps: Annotated[int, Field(ge=1)] = 100
    """Training steps (policy versions to make)."""
    model: ModelConfig
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    pipeline: PipelineConfig = PipelineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return Path(self.output_dir) if self.output_dir else Path("outputs") / self.name

    @property
    def censor_delta(self) -> float | None:
        """The censoring that the engine executes: set exactly when the likelihood is `censored`."""
        if self.sampling.thinking == "discrete" or self.algorithm.likelihood != "censored":
            return None
        return self.sampling.censor_delta or DEFAULT_CENSOR_DELTA

    @property
    def slots(self) -> int:
        """Groups that may be outstanding: (max_staleness + 1) x batch."""
        return (self.pipeline.max_staleness + 1) * self.algorithm.prompts_per_step

    @property
    def alternates(self) -> bool:
        """Synchronous steps on a GPU that an engine and a learner rank share: each phase has the memory to itself."""
        shared = 0 < self.rollout.num_gpus < 1 and 0 < self.learner.num_gpus < 1
        return shared and self.pipeline.max_staleness == 0

    @property
    def responses_per_step(self) -> int:
        """Trajectories in one training step."""
        return self.algorithm.prompts_per_step * self.algorithm.group_size

    @property
    def thinking_budget(self) -> int:
        """Longest thinking phase in tokens."""
        return min(
            self.sampling.max_thinking_tokens or self.sampling.max_new_tokens,
            self.sampling.max_new_tokens,
        )

    @property
    def max_model_len(self) -> int:
        """Longest sequence of the engine."""
        return self.data.max_prompt_tokens + self.sampling.max_new_tokens

    @model_validator(mode="after")
    def check_combinations(self) -> Config:
        """Refuse combinations that no part could run."""
        for problem in impossible_combinations(self):
            raise ValueError(problem)
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides (values are YAML) and validate.

    Raises `ConfigError` with one line per problem.
    """
    try:
        tree = strict_yaml.load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give --config a YAML file (see configs/)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level, found {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """Validate a tree of plain values; `source` names it in messages."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(problem, source) for problem in error.errors())) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; loading it gives an equal configuration."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in a tree of plain values; the value is YAML. Raises `ConfigError`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    secret = SECRET_NAME.search(key)
    shown = repr(f"{key}={HIDDEN}" if secret else override)
    try:
        value = strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {shown}: the value is not YAML" + ("" if secret else f": {error}")) from None
    *sections, leaf = key.split(".")
    node = tree
    for name in sections:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {shown}: {name} is a value, not a section")
        node = child
    node[leaf] = value


def _describe(problem: Any, source: str) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    value = HIDDEN if SECRET_NAME.search(key) else repr(redact(problem["input"]))
    if problem["type"] == "extra_forbidden":
        return f"{source}: {key}={value}: unknown key; {_nearest_key(problem['loc'])}"
    if problem["type"] == "missing":
        return f"{source}: {key}: required, but missing"
    if problem["type"] == "value_error" and not key:
        return f"{source}: {problem['ctx']['error']}"
    return f"{source}: {key}={value}: {problem['msg'].removeprefix('Value error, ')}"


def _nearest_key(location: tuple[Any, ...]) -> str:
    import difflib

    section: Any = Config
    for part in location[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field else None
    names = list(getattr(section, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known keys: {', '.join(names)}" if names else "remove it"
