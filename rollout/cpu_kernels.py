"""Torch implementations of the Triton kernels that vLLM's model runner V2 launches, for machines without Triton.

They make the CPU a supported platform: same arguments, same results, registered through vLLM's own kernel registry
(`vllm.triton_utils.dispatcher.register_kernels`). A launch `kernel[grid](*args, **constants)` arrives here without its
grid, so sizes are read from the tensors. What the registry cannot reach is in `_announce_kernels`.

Only the launches of plain text generation are covered. Penalties, logit bias, bad words, grammars and speculative
decoding have no implementation here; requests that need them are refused before they reach the engine.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from rollout import cpu_sampling

_INPUT_BATCH = "vllm.v1.worker.gpu.input_batch"
_SAMPLE = "vllm.v1.worker.gpu.sample"


@functools.cache
def install() -> bool:
    """Register the kernels in this process, once; False where Triton runs the originals."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON or not current_platform.is_cpu():
        return False
    import vllm.v1.worker.cpu.shm  # noqa: F401  (must precede every import of the runner's modules)
    from vllm.triton_utils.dispatcher import register_kernels

    _announce_kernels()
    register_kernels(
        {
            "vllm.v1.worker.gpu.buffer_utils._apply_write_kernel": apply_write,
            "vllm.v1.worker.gpu.block_table._gather_block_tables_kernel": gather_block_tables,
            "vllm.v1.worker.gpu.block_table._compute_slot_mappings_kernel": compute_slot_mappings,
            f"{_INPUT_BATCH}._prepare_prefill_inputs_kernel": prepare_prefill_inputs,
            f"{_INPUT_BATCH}._prepare_pos_seq_lens_kernel": prepare_pos_seq_lens,
            f"{_INPUT_BATCH}._combine_sampled_and_draft_tokens_kernel": combine_sampled_tokens,
            f"{_INPUT_BATCH}._get_num_sampled_and_rejected_kernel": count_sampled,
            f"{_INPUT_BATCH}._post_update_kernel": post_update,
            f"{_INPUT_BATCH}._post_update_num_computed_tokens_kernel": post_update_num_computed,
            f"{_SAMPLE}.gumbel._temperature_kernel": cpu_sampling.apply_temperature,
            f"{_SAMPLE}.gumbel._gumbel_sample_kernel": cpu_sampling.sample_tokens,
            f"{_SAMPLE}.min_p._min_p_kernel": cpu_sampling.apply_min_p,
            f"{_SAMPLE}.logprob._topk_log_softmax_kernel": cpu_sampling.log_softmax_at,
            f"{_SAMPLE}.logprob._ranks_kernel": cpu_sampling.token_ranks,
        }
    )
    return True


def _announce_kernels() -> None:
    """The two things that vLLM's registry cannot express, both about Triton's absence and not about any behaviour.

    Its configuration refuses the V2 runner by a module flag that means "the runner's kernels can run", which is now
    so; and its stand-in module for a missing Triton lacks `next_power_of_2`, which host code of the runner calls.
    """
    import vllm.config.vllm as configuration
    from vllm.triton_utils import triton
    from vllm.utils.math_utils import next_power_of_2

    if not hasattr(configuration, "HAS_TRITON"):
        raise RuntimeError("vllm.config.vllm.HAS_TRITON is gone: check how this vLLM accepts the V2 runner on a CPU")
    configuration.HAS_TRITON = True
    if not hasattr(triton, "next_power_of_2"):
        triton.next_power_of_2 = next_power_of_2


def _row_of_token(query_start_loc: Tensor, num_rows: int) -> Tensor:
    """The batch row of every scheduled token, [num_tokens] int64."""
    starts = query_start_loc[: num_rows + 1].long()
    return torch.repeat_interleave(torch.arange(num_rows), starts[1:] - starts[:-1])


# --- buffers and block tables -------------------------------------------------------------------------------------


def apply_write(
    output: Tensor,
    output_stride: Any,
    indices: Tensor,
    starts: Tensor,
    contents: Tensor,
    cu_lens: Tensor,
    group_ids: Tensor | None,
    **constants: Any,
) -> None:
    """output[indices[i], starts[i]:] = contents of write i."""
    if group_ids is not None:
        raise NotImplementedError("several KV cache groups on a machine without Triton")
    ends = cu_lens.tolist()
    begin = 0
    for index, start, end in zip(indices.tolist(), starts.tolist(), ends, strict=True):
        values = contents[begin:end]
        if output.dim() == 1:
            output[index + start : index + start + end - begin] = values
        else:
            output[index, start : start + end - begin] = values
        begin = end


def _int32_table(address: int, num_rows: int, stride: int) -> Tensor:
    """A tensor over memory that vLLM hands to kernels by address: [num_rows, stride] int32, owned by the runner."""
    memory = (ctypes.c_int32 * (num_rows * stride)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.int32).view(num_rows, stride)


def gather_block_tables(
    idx_mapping: Tensor,
    source_pointers: Tensor,
    target_pointers: Tensor,
    strides: Tensor,
    num_blocks: Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    **constants: Any,
) -> None:
    """target[g][b] = source[g][idx_mapping[b]] up to its number of blocks."""
    slots = idx_mapping[:num_reqs].long()
    max_slots = num_blocks.shape[1]
    for group, stride in enumerate(strides.tolist()):
        source = _int32_table(int(source_pointers[group]), max_slots, stride)
        target = _int32_table(int(target_pointers[group]), max_slots, stride)
        width = int(num_blocks[group, slots].max()) if num_reqs else 0
        target[:num_reqs, :width] = source[slots, :width]


def compute_slot_mappings(
    max_num_tokens: int,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    block_table_pointers: Tensor,
    strides: Tensor,
    block_sizes: Tensor,
    enabled: Tensor,
    dcp_sharded: Tensor,
    slot_mappings: Tensor,
    slot_mappings_stride: int,
    cp_rank: int,
    *,
    CP_SIZE: int,
    PAD_ID: int,
    **constants: Any,
) -> None:
    """KV slot of every scheduled token: block number * block size + offset; padding gets PAD_ID."""
    if CP_SIZE != 1:
        raise NotImplementedError("decode context parallelism on a machine without Triton")
    num_reqs = idx_mapping.shape[0]
    num_tokens = int(query_start_loc[num_reqs])
    slots = idx_mapping[_row_of_token(query_start_loc, num_reqs)].long()
    position = positions[:num_tokens].long()
    max_slots = int(idx_mapping.max()) + 1 if num_reqs else 0
    slot_mappings[:, num_tokens:max_num_tokens] = PAD_ID
    for group, (stride, size) in enumerate(zip(strides.tolist(), block_sizes.tolist(), strict=True)):
        if not bool(enabled[group]):
            slot_mappings[group, :num_tokens] = PAD_ID
            continue
        table = _int32_table(int(block_table_pointers[group]), max(max_slots, 1), stride)
        block = table[slots.clamp(min=0), position // size].long()
        mapped = block * size + position % size
        slot_mappings[group, :num_tokens] = torch.where(slots >= 0, mapped, PAD_ID)


# --- input batch --------------------------------------------------------------------------------------------------


def prepare_prefill_inputs(
    input_ids: Tensor,
    next_prefill_tokens: Tensor,
    next_stride: int,
    num_lookahead: int,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    all_token_ids: Tensor,
    all_token_ids_stride: int,
    prefill_lens: Tensor,
    num_computed_tokens: Tensor,
    **constants: Any,
) -> None:
    """Copy the scheduled prompt tokens of prefilling requests into the flat input."""
    computed = num_computed_tokens[idx_mapping].tolist()
    prefill = prefill_lens[idx_mapping].tolist()
    starts = query_start_loc.tolist()
    for row, slot in enumerate(idx_mapping.tolist()):
        if computed[row] >= prefill[row]:
            continue
        length = starts[row + 1] - starts[row]
        first = computed[row]
        input_ids[starts[row] : starts[row + 1]] = all_token_ids[slot, first : first + length]
        for ahead in range(num_lookahead):
            position = first + length + ahead
            inside = position < prefill[row]
            next_prefill_tokens[ahead, slot] = all_token_ids[slot, position] if inside else 0


def prepare_pos_seq_lens(
    positions: Tensor,
    seq_lens: Tensor,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    num_computed_tokens: Tensor,
    max_num_reqs: int,
    **constants: Any,
) -> None:
    """Positions of the scheduled tokens and sequence lengths after them."""
    num_reqs = idx_mapping.shape[0]
    starts = query_start_loc[: num_reqs + 1].long()
    lengths = starts[1:] - starts[:-1]
    computed = num_computed_tokens[idx_mapping].long()
    seq_lens[num_reqs:max_num_reqs] = 0
    seq_lens[:num_reqs] = (computed + lengths).to(seq_lens.dtype)
    num_tokens = int(starts[-1])
    if num_tokens == num_reqs:
        positions[:num_tokens] = computed
        return
    row = torch.repeat_interleave(torch.arange(num_reqs), lengths)
    positions[:num_tokens] = computed[row] + torch.arange(num_tokens) - starts[row]


def combine_sampled_tokens(
    input_ids: Tensor,
    idx_mapping: Tensor,
    last_sampled_tokens: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    prefill_len: Tensor,
    draft_tokens: Tensor,
    draft_tokens_stride: int,
    cu_num_logits: Tensor,
    logits_indices: Tensor,
    **constants: Any,
) -> None:
    """Decoding rows get their last sampled token as input; every row's last token gets the logits."""
    num_reqs = idx_mapping.shape[0]
    if logits_indices.shape[0] != num_reqs:
        raise NotImplementedError("draft tokens on a machine without Triton")
    last = query_start_loc[1 : num_reqs + 1].long() - 1
    logits_indices.copy_(last)
    decoding = seq_lens[:num_reqs] > prefill_len[idx_mapping]
    sampled = last_sampled_tokens[idx_mapping, 0].to(input_ids.dtype)
    input_ids[last] = torch.where(decoding, sampled, input_ids[last])


def count_sampled(
    num_sampled: Tensor,
    num_rejected: Tensor,
    seq_lens: Tensor,
    cu_num_logits: Tensor,
    idx_mapping: Tensor,
    prefill_len: Tensor,
    **constants: Any,
) -> None:
    """One token per row, none while a prompt is still being prefilled; nothing is ever rejected."""
    num_sampled.masked_fill_(seq_lens[: num_sampled.shape[0]] < prefill_len[idx_mapping], 0)
    num_rejected.zero_()


def post_update(
    idx_mapping: Tensor,
    num_computed_tokens: Tensor,
    last_sampled_tokens: Tensor,
    output_bin_counts: Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens: Tensor,
    sampled_tokens_stride: int,
    num_sampled: Tensor,
    num_rejected: Tensor,
    query_start_loc: Tensor | None,
    all_token_ids: Tensor,
    all_token_ids_stride: int,
    total_len: Tensor,
    **constants: Any,
) -> None:
    """Append the sampled token of every row to its request."""
    real = idx_mapping >= 0
    emitting = real & (num_sampled[: idx_mapping.shape[0]] > 0)
    slots = idx_mapping[emitting]
    tokens = sampled_tokens[: idx_mapping.shape[0], 0][emitting]
    last_sampled_tokens[slots, 0] = tokens.to(last_sampled_tokens.dtype)
    all_token_ids[slots, total_len[slots].long()] = tokens.to(all_token_ids.dtype)
    total_len[slots] += 1
    if output_bin_counts is not None:
        output_bin_counts[slots, tokens.long()] += 1
    if query_start_loc is not None:
        starts = query_start_loc[: idx_mapping.shape[0] + 1]
        lengths = (starts[1:] - starts[:-1] - num_rejected[: idx_mapping.shape[0]])[real]
        num_computed_tokens[idx_mapping[real]] += lengths.to(num_computed_tokens.dtype)


def post_update_num_computed(
    idx_mapping: Tensor, num_computed_tokens: Tensor, query_start_loc: Tensor, **constants: Any
) -> None:
    """Advance every request by its scheduled tokens."""
    starts = query_start_loc[: idx_mapping.shape[0] + 1]
    num_computed_tokens[idx_mapping] += (starts[1:] - starts[:-1]).to(num_computed_tokens.dtype)
