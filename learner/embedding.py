"""Inputs of a replayed trajectory: ordinary token embeddings, and mixtures of K of them at soft rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag


def soft_input_embeddings(
    embedding_weight: Tensor, ids: Tensor, weights: Tensor, *, differentiable: bool = False
) -> Tensor:
    """sum_k weights[:, k] * embedding_weight[ids[:, k]], [M, d] of the type of the table; ids [M, K], weights [M, K].

    Summed in fp32 and rounded once, as the engine does. Ids of weight 0 only have to be valid. Without `differentiable`
    no gradient reaches the table (the published recipe detaches the mixture too).
    """
    table = embedding_weight if differentiable else embedding_weight.detach()
    weights = weights.detach()
    if table.dtype in (torch.float32, torch.float64):
        weights = weights.to(table.dtype)
        if not weights.is_cpu:
            return embedding_bag(ids.long(), table, per_sample_weights=weights, mode="sum")
        # Most candidates of a censored mixture have weight 0, and reading their rows is all that this costs.
        used = weights != 0
        counts = used.sum(-1)
        return embedding_bag(
            ids[used].long(), table, counts.cumsum(0) - counts, per_sample_weights=weights[used], mode="sum"
        )
    total = torch.zeros(ids.shape[0], table.shape[1], dtype=torch.float32, device=table.device)
    for column in range(ids.shape[1]):
        total = torch.addcmul(total, embedding(ids[:, column].long(), table).float(), weights[:, column, None].float())
    return total.to(table.dtype)


def replay_embeddings(
    embedding_weight: Tensor,
    input_ids: Tensor,
    mixture_rows: Tensor,
    mixture_ids: Tensor,
    mixture_weights: Tensor,
    *,
    differentiable_mixtures: bool = False,
) -> Tensor:
    """Input embeddings [L, d] of packed rows [L]: token embeddings, replaced by the mixtures at `mixture_rows` [M].

    Token rows are differentiable as usual; mixture rows only with `differentiable_mixtures`.
    """
    tokens = embedding(input_ids, embedding_weight)
    if mixture_rows.numel() == 0:
        return tokens
    mixtures = soft_input_embeddings(
        embedding_weight, mixture_ids, mixture_weights, differentiable=differentiable_mixtures
    )
    return tokens.index_copy(0, mixture_rows, mixtures)
