"""What `config.json` says of a checkpoint: sizes for plans and checks, without loading anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.config import ConfigError

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
OPTIONAL = ("num_key_value_heads", "head_dim")
RESCALED = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logits_mup_width_multiplier",
    "lm_head_multiplier",
    "embedding_multiplier",
    "scale_emb",
)
"""Keys with which a model (Gemma, Granite, Cohere, MiniCPM, ...) changes what its embedding or output matrix gives."""
SCALED_EMBEDDINGS = "gemma"
"""Model types that scale embeddings by sqrt(hidden_size), without a key that says so."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Shape of a decoder with gated feed-forward layers (Llama, Qwen2, Qwen3 and their like)."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    tied_embeddings: bool
    has_weights: bool
    """At least one safetensors file lies beside config.json."""

    @property
    def num_parameters(self) -> int:
        """Weights of all matrices; biases and norms (under 0.1 %) are left out."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + feed_forward) + embeddings

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Keys and values of one position in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value


def read_model_facts(directory: Path) -> ModelFacts:
    """Read `config.json`; raises `ConfigError` for a directory that is no checkpoint of a supported kind."""
    file = directory / "config.json"
    try:
        tree: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model.path={directory}: no config.json; give a Hugging Face checkpoint directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not readable JSON: {error}") from None
    _require_sizes(file, tree)
    rescaled = [f"{key}={tree[key]}" for key in RESCALED if tree.get(key) not in (None, 0, 1)]
    if str(tree.get("model_type")).startswith(SCALED_EMBEDDINGS):
        rescaled.append(f"model_type={tree['model_type']} (scaled embeddings)")
    if rescaled:
        raise ConfigError(
            f"{file}: {', '.join(rescaled)}: the learner scores candidates and mixes soft tokens with bare rows of the "
            "output and embedding matrices and would train on wrong likelihoods; choose a model without, such as Qwen "
            "or Llama"
        )
    has_weights = any(directory.glob("*.safetensors"))
    if not has_weights and any(directory.glob("*.bin")):
        raise ConfigError(
            f"model.path={directory}: weights are pickles (*.bin), which are not loaded; convert them to safetensors"
        )
    heads = tree["num_attention_heads"]
    return ModelFacts(
        architecture=next(iter(tree.get("architectures") or ()), "unknown"),
        vocab_size=tree["vocab_size"],
        hidden_size=tree["hidden_size"],
        intermediate_size=tree["intermediate_size"],
        num_layers=tree["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=tree.get("num_key_value_heads") or heads,
        head_dim=tree.get("head_dim") or tree["hidden_size"] // heads,
        max_positions=tree["max_position_embeddings"],
        tied_embeddings=bool(tree.get("tie_word_embeddings", False)),
        has_weights=has_weights,
    )


def _require_sizes(file: Path, tree: Any) -> None:
    """Raise `ConfigError` for a `config.json` without the sizes of a decoder, or with some that no model can have."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected an object, found {type(tree).__name__}")
    absent = [key for key in REQUIRED if tree.get(key) is None]
    if absent:
        raise ConfigError(f"{file}: {', '.join(absent)} missing; only text decoders like Llama and Qwen2 are supported")
    given = {key: tree[key] for key in (*REQUIRED, *OPTIONAL) if tree.get(key) is not None}
    wrong = [f"{key}={value!r:.40}" for key, value in given.items() if type(value) is not int or value < 1]
    if wrong:
        raise ConfigError(f"{file}: {', '.join(wrong)}: expected whole numbers from 1; restore the model's own file")
    if not isinstance(tree.get("architectures") or [], list):
        raise ConfigError(f"{file}: architectures={tree['architectures']!r:.80}: expected a list of names")
