"""Configurations and weights of the tiny networks that tests build."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_llama(**changes: Any) -> LlamaConfig:
    """Two layers, two heads of 16 that share keys, 64 tokens."""
    return LlamaConfig(**{**SHAPE, **changes})


def tiny_qwen2(**changes: Any) -> Qwen2Config:
    """The same with two heads of 32 and biases in the attention projections."""
    return Qwen2Config(**{**SHAPE, "hidden_size": 64, "intermediate_size": 96, **changes})


def tiny_qwen3(**changes: Any) -> Qwen3Config:
    """The same with norms of queries and keys and no biases; two heads of 32."""
    return Qwen3Config(**{**SHAPE, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32, **changes})


def spread_weights(model: nn.Module) -> None:
    """Matrices that make distributions neither flat nor sharp: soft feedback amplifies fp32 noise otherwise. In place,
    from torch's global generator."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3 if "embed" in name or "lm_head" in name else 0.06)
