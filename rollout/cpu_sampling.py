"""Torch implementations of the Triton kernels behind vLLM's stock sampler; registered by `rollout.cpu_kernels`.

The answers of soft requests and all of discrete ones are drawn here on a machine without Triton.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_SUM_BLOCK = 512
"""Columns whose probabilities are summed before the cumulative sum of the inverse-CDF draw."""
_ROWS = 16
"""Rows sampled together: temporaries that fit the cache are worth a factor of two to four."""


def apply_temperature(
    logits: Tensor, logits_stride: int, idx_mapping: Tensor, temperature: Tensor, vocab_size: int, **constants: Any
) -> None:
    """Divide the rows by their temperature in place; greedy rows (0) stay as they are."""
    per_row = temperature[idx_mapping]
    logits.div_(torch.where(per_row == 0, 1.0, per_row)[:, None])


def apply_min_p(
    logits: Tensor, logits_stride: int, idx_mapping: Tensor, min_p: Tensor, vocab_size: int, **constants: Any
) -> None:
    """Mask tokens under min_p times the largest probability, in place."""
    threshold = logits.amax(-1, keepdim=True) + torch.log(min_p[idx_mapping])[:, None]
    logits.masked_fill_(logits < threshold, float("-inf"))


def uniform_draws(seeds: Tensor, positions: Tensor) -> Tensor:
    """One uniform number per row in (0, 1), a splitmix64 hash of (seed, position); [B] fp64.

    Depends on nothing else: a preempted, resumed or differently batched request draws the same answer.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        mixed = _splitmix64(seeds.numpy().astype(np.uint64) + np.uint64(0xD1B54A32D192ED03))
        mixed = _splitmix64(mixed ^ (positions.numpy().astype(np.uint64) + np.uint64(1)) * golden)
    return torch.from_numpy(((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """Token of softmax(logits) [B, V] fp32 at the quantile `uniform` [B] fp64; [B] int64."""
    chunks = zip(logits.split(_ROWS), uniform.split(_ROWS), strict=True)
    return torch.cat([_inverse_cdf(*chunk) for chunk in chunks])


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """Two levels (sums of blocks, then one block): only B x V exponentials are computed and rounding stays local."""
    rows, vocab = logits.shape
    num_blocks = -(-vocab // _SUM_BLOCK)
    weights = logits.new_zeros(rows, num_blocks * _SUM_BLOCK, dtype=torch.float32)
    torch.sub(logits, logits.amax(-1, keepdim=True), out=weights[:, :vocab])
    weights[:, :vocab].exp_()
    blocks = weights.view(rows, num_blocks, _SUM_BLOCK)
    cumulative = blocks.sum(-1, dtype=torch.float32).double().cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=num_blocks - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks[torch.arange(rows), block[:, 0]].double().cumsum(-1)
    offset = torch.searchsorted(inside, (target - before).clamp_(min=0.0), right=True)
    # Rounding between the two levels may leave the target past the block's end: take its last token with mass.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous(), right=False)
    return (block * _SUM_BLOCK + torch.minimum(offset, last))[:, 0]


def sample_tokens(
    local_argmax: Tensor,
    local_argmax_stride: int,
    local_max: Tensor,
    local_max_stride: int,
    logits_cache: Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col: Tensor | None,
    logits_cache_source: Tensor | None,
    logits_cache_source_stride: int,
    logits: Tensor,
    logits_stride: int,
    idx_mapping: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    vocab_size: int,
    *,
    APPLY_TEMPERATURE: bool,
    **constants: Any,
) -> None:
    """Sample every row from softmax(logits), greedily where its temperature is 0.

    The original draws Gumbel noise for the whole vocabulary; on a CPU one uniform number and the inverse CDF give the
    same distribution for a tenth of the time. The result is written as the winner of the first block.
    """
    if logits_cache is not None:
        raise NotImplementedError("draft logits on a machine without Triton")
    per_row = temperature[idx_mapping]
    if APPLY_TEMPERATURE:
        logits = logits / torch.where(per_row == 0, 1.0, per_row)[:, None]
    greedy = per_row == 0
    if bool(greedy.all()):
        tokens = logits.argmax(-1)
    else:
        tokens = inverse_cdf(logits, uniform_draws(seeds[idx_mapping], positions))
        if bool(greedy.any()):
            tokens = torch.where(greedy, logits.argmax(-1), tokens)
    local_max.fill_(float("-inf"))
    local_max[:, 0] = 0.0
    local_argmax[:, 0] = tokens


def log_softmax_at(
    output: Tensor,
    logits: Tensor,
    logits_stride: int,
    token_ids: Tensor,
    token_ids_stride: int,
    num_ids: int,
    vocab_size: int,
    **constants: Any,
) -> None:
    """output = log_softmax(logits) at `token_ids`, fp32."""
    values = logits.float()
    output.copy_(values.gather(1, token_ids) - torch.logsumexp(values, -1, keepdim=True))


def token_ranks(
    output: Tensor, logits: Tensor, logits_stride: int, token_ids: Tensor, vocab_size: int, **constants: Any
) -> None:
    """Number of tokens with at least the logit of `token_ids`."""
    chosen = logits.gather(1, token_ids.long()[:, None])
    output.copy_((logits >= chosen).sum(-1))
