"""Packed against padded training steps on log-normal lengths (sigma 0.8), one small Llama-layout model."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from learner.attention import attention_inputs, use_packed_attention
from learner.packing import plan_packs
from tests.benchmarks._timing import best_ratio, interleaved
from tests.benchmarks.row import Row
from tests.learner.sequences import packed_positions

SEQUENCES, PADDED_BATCH, TOKEN_BUDGET, LONGEST = 32, 8, 2048, 1024
WIDTH, LAYERS = 256, 4
ROUNDS = 3


def log_normal_lengths() -> list[int]:
    """Median 150, sigma 0.8, cut to [16, LONGEST]."""
    generator = torch.Generator().manual_seed(0)
    lengths = 150 * (0.8 * torch.randn(SEQUENCES, generator=generator)).exp()
    return lengths.clamp(16, LONGEST).int().tolist()


def run(names: set[str] | None) -> list[Row]:
    """Row `packing/step`: CPU time of one thread, forward and backward over all sequences."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LONGEST,
        attn_implementation="sdpa",
    )
    padded_model = LlamaModel(config)
    packed_model = LlamaModel(config)
    packed_model.load_state_dict(padded_model.state_dict())
    use_packed_attention(packed_model)
    lengths = log_normal_lengths()
    inputs = [0.5 * torch.randn(length, WIDTH) for length in lengths]
    plan = plan_packs(lengths, token_budget=TOKEN_BUDGET)[0]

    def padded() -> Tensor:
        loss = torch.zeros(())
        for start in range(0, SEQUENCES, PADDED_BATCH):
            part = inputs[start : start + PADDED_BATCH]
            batch = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            counts = torch.tensor([len(piece) for piece in part])
            mask = torch.arange(batch.shape[1])[None] < counts[:, None]
            hidden = padded_model(inputs_embeds=batch, attention_mask=mask.long(), use_cache=False)[0]
            loss = loss + backward(hidden[mask])
        return loss

    def packed() -> Tensor:
        loss = torch.zeros(())
        for members in plan:
            positions, boundaries = packed_positions([lengths[i] for i in members])
            hidden = packed_model(
                inputs_embeds=torch.cat([inputs[i] for i in members])[None],
                position_ids=positions[None],
                use_cache=False,
                **attention_inputs(boundaries),
            )[0]
            loss = loss + backward(hidden[0])
        return loss

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        theirs, ours = float(padded()), float(packed())
        seconds = interleaved({"padded": padded, "packed": packed}, ROUNDS, clock=time.process_time)
    finally:
        torch.set_num_threads(threads)
    difference = abs(theirs - ours) / abs(theirs)
    ratio = best_ratio(seconds["padded"], seconds["packed"]) if difference < 1e-5 else 0.0
    rows = sum(PADDED_BATCH * max(lengths[start : start + PADDED_BATCH]) for start in range(0, SEQUENCES, PADDED_BATCH))
    detail = (
        f"padded {min(seconds['padded']):.2f} s, packed {min(seconds['packed']):.2f} s; losses differ by "
        f"{difference:.0e}; floor: {rows} padded rows / {sum(lengths)} real ones = {rows / sum(lengths):.2f}"
    )
    return [Row("packing/step", ratio, 1.5, detail)]


def backward(hidden: Tensor) -> Tensor:
    """A loss that every row enters."""
    loss = hidden.square().mean(-1).sum()
    loss.backward()
    return loss.detach()
