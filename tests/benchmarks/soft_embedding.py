"""Soft input embeddings against gather and einsum (T = 4096, K = 5, d = 768, V = 151,936)."""

from __future__ import annotations

import time

import torch

from learner.embedding import soft_input_embeddings
from tests.benchmarks._timing import best_ratio, interleaved
from tests.benchmarks.row import Row

ROWS, CANDIDATES, WIDTH, VOCABULARY = 4096, 5, 768, 151_936
ROUNDS = 15


def run(names: set[str] | None) -> list[Row]:
    """Row `soft_embedding/forward`: CPU time of one thread, best rounds."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, WIDTH, generator=generator)
    ids = torch.randint(0, VOCABULARY, (ROWS, CANDIDATES), generator=generator)
    weights = (torch.randn(ROWS, CANDIDATES, generator=generator) / 0.1).softmax(-1)

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
    read = ROWS * (CANDIDATES + 1) * WIDTH * 4 / 1e9
    detail = (
        f"einsum {1e3 * min(seconds['einsum']):.1f} ms, ours {1e3 * min(seconds['ours']):.2f} ms "
        f"({read / min(seconds['ours']):.1f} GB/s of the rows it must touch); error {error:.0e}"
    )
    return [Row("soft_embedding/forward", ratio, 10.0, detail)]
