"""Attention of packed sequences in stock transformers models: causal inside a sequence, nothing across.

With flash-attention installed (CUDA, half precision) its varlen kernel is used through transformers. Otherwise an
attention function of ours, registered through transformers' `AttentionInterface`, runs `scaled_dot_product_attention`
sequence by sequence on the packed rows: no [L, L] mask, no padding. Both take the same keyword arguments
(`attention_inputs`), which transformers passes from the model's forward to every attention layer.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

PACKED_ATTENTION = "softgrpo_packed"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Keyword arguments of attention layers that change the scores; set, they would silently be ignored here."""


def use_packed_attention(model: Any) -> str:
    """Switch a transformers model to packed attention; the name of the implementation that was set.

    Raises `ValueError` for models whose attention cannot be exchanged.
    """
    from transformers import AttentionInterface

    parameter = next(model.parameters())
    half = parameter.dtype in (torch.bfloat16, torch.float16)
    if parameter.is_cuda and half and importlib.util.find_spec("flash_attn") is not None:
        implementation = "flash_attention_2"
    else:
        AttentionInterface.register(PACKED_ATTENTION, packed_attention)
        implementation = PACKED_ATTENTION
    model.set_attn_implementation(implementation)
    if model.config._attn_implementation != implementation:
        raise ValueError(
            f"{type(model).__name__} does not accept the attention implementation {implementation}: packed sequences "
            "would attend to each other"
        )
    return implementation


def attention_inputs(cu_seqlens: Tensor) -> dict[str, Any]:
    """Keyword arguments for the model's forward from the sequence boundaries [B + 1]."""
    boundaries = cu_seqlens.to(torch.int32)
    longest = int((boundaries[1:] - boundaries[:-1]).max()) if boundaries.numel() > 1 else 0
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, L, d], key and value [1, kv_heads, L, d] -> ([1, L, heads, d], no attention weights).

    Without `cu_seq_lens_q` the rows are one sequence per batch entry.
    """
    refused = [name for name in UNSUPPORTED if options.get(name) is not None]
    if sliding_window is not None and max_length_q > sliding_window:
        refused.append(f"sliding_window={sliding_window} on sequences of {max_length_q}")
    if refused:
        raise ValueError(f"packed attention does not support {', '.join(refused)}; install flash-attn")
    settings: dict[str, Any] = {"dropout_p": dropout, "is_causal": True, "scale": scaling}
    settings["enable_gqa"] = key.shape[1] != query.shape[1]
    if cu_seq_lens_q is None:
        return scaled_dot_product_attention(query, key, value, **settings).transpose(1, 2), None
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    pieces = [
        scaled_dot_product_attention(*sequence, **settings).transpose(1, 2)
        for sequence in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=1), None
