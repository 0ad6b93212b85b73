"""Soft input embeddings against gather and einsum (T = 4096, K = 5, d = 768, V = 151,936)."""

from __future__ import annotations

import math
import time

import torch

from learner.embedding import soft_input_embeddings
from tests.benchmarks._timing import best_ratio, interleaved
from tests.benchmarks.row import Row

ROWS, CANDIDATES, WIDTH, VOCABULARY = 4096, 5, 768, 151_936
ROUNDS = 15


def executed_weights(generator: torch.Generator) -> torch.Tensor:
    """[ROWS, CANDIDATES] as the default settings execute them: Gumbel noise, temperature 0.1, censored at 1e-3."""
    log_p = torch.randn(ROWS, CANDIDATES, generator=generator).mul(2).log_softmax(-1)
    uniform = torch.rand(ROWS, CANDIDATES, generator=generator).clamp(1e-6, 1 - 1e-6)
    perturbed = log_p - torch.log(-torch.log(uniform))
    threshold = perturbed.amax(-1, keepdim=True) + 0.1 * math.log(1e-3)
    return (perturbed.masked_fill(perturbed < threshold, -torch.inf) / 0.1).softmax(-1)


def run(names: set[str] | None) -> list[Row]:
    """Row `soft_embedding/forward`: CPU time of one thread, best rounds."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, WIDTH, generator=generator)
    ids = torch.randint(0, VOCABULARY, (ROWS, CANDIDATES), generator=generator)
    weights = executed_weights(generator)

    def einsum() -> torch.Tensor:
        return torch.einsum("tk,tkd->td", weights, table[ids])

    error = float((soft_input_embeddings(table, ids, weights) - einsum()).abs().max())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = interleaved(
            {"ours": lambda: soft_input_embeddings(table, ids, weights), "einsum": einsum},
            ROUNDS,
            clock=time.process_time,
        )
    finally:
        torch.set_num_threads(threads)
    ratio = best_ratio(seconds["einsum"], seconds["ours"]) if error < 1e-5 else 0.0
    used = (weights > 0).sum(-1).double().mean().item()
    read = ROWS * (used + 1) * WIDTH * 4 / 1e9
    detail = (
        f"einsum {1e3 * min(seconds['einsum']):.1f} ms, ours {1e3 * min(seconds['ours']):.2f} ms "
        f"({read / min(seconds['ours']):.1f} GB/s of the rows it must touch, {used:.1f} of "
        f"{CANDIDATES} candidates); error {error:.0e}"
    )
    return [Row("soft_embedding/forward", ratio, 10.0, detail)]
