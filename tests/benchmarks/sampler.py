"""The sampler against the reference's order of operations and against the LM head before it (B = 32, V = 151,936)."""

from __future__ import annotations

import torch
from torch import Tensor

from rollout.noise import CounterNoise
from rollout.soft_token import SoftTokenParams, SoftTokens, sample_soft_tokens
from tests.benchmarks._timing import best_ratio, interleaved
from tests.benchmarks.row import Row

BATCH, VOCABULARY, HIDDEN, CANDIDATES = 32, 151_936, 1536, 5
TAU, TOP_P, CLIP, LOG_EPSILON = 0.1, 0.95, (-1.5, 3.0), 1e-6
ROUNDS = 7


def reference_order(logits: Tensor, exponential: Tensor) -> tuple[Tensor, Tensor]:
    """Our own restatement of the released order: everything over V, sorted, and only then the K columns."""
    probabilities = torch.softmax(logits, dim=-1)
    torch.log(probabilities).clamp_min_(torch.finfo(torch.float32).min)  # recorded for the log-prob of the token
    (-probabilities * torch.log(probabilities.clamp_min(1e-12))).sum(dim=-1)  # entropy, computed every step
    kth = torch.topk(probabilities, CANDIDATES, dim=-1).values[:, -1:]
    kept = torch.where(probabilities >= kth, probabilities, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    ordered, order = torch.sort(kept, dim=-1, descending=True)
    before = torch.cumsum(ordered, dim=-1) - ordered
    kept = torch.zeros_like(kept).scatter_(1, order, torch.where(before < TOP_P, ordered, 0.0))
    kept = kept / kept.sum(dim=-1, keepdim=True)
    values, ids = torch.topk(kept, CANDIDATES, dim=-1)
    values = torch.log(values / values.sum(dim=-1, keepdim=True) + LOG_EPSILON)
    perturbed = values + torch.clamp(-torch.log(exponential), *CLIP)
    weights, order = torch.sort(torch.softmax(perturbed / TAU, dim=-1), dim=-1, descending=True)
    return ids.gather(1, order), weights


def check(logits: Tensor, noise: Tensor, found: SoftTokens) -> float:
    """Largest difference of the two mixtures over the vocabulary."""
    ids, weights = reference_order(logits, torch.exp(-noise))
    ours = torch.zeros_like(logits).scatter_(1, found.ids.long(), found.weights)
    return float((ours - torch.zeros_like(logits).scatter_(1, ids, weights)).abs().max())


def run(names: set[str] | None) -> list[Row]:
    """Rows `sampler/reference_order` and `sampler/head`."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(BATCH, VOCABULARY, generator=generator)
    hidden, head = torch.randn(BATCH, HIDDEN, generator=generator), torch.randn(VOCABULARY, HIDDEN, generator=generator)
    exponential = torch.empty(BATCH, CANDIDATES).exponential_(generator=generator)
    params = SoftTokenParams(noise_clip=CLIP, log_epsilon=LOG_EPSILON, max_candidates=CANDIDATES)
    gap = check(logits, -torch.log(exponential), sample_soft_tokens(logits, params, -torch.log(exponential)))
    rows = torch.arange(BATCH)
    plain = SoftTokenParams(censor_delta=1e-3, max_candidates=CANDIDATES)
    seconds = interleaved(
        {
            "ours": lambda: sample_soft_tokens(logits, plain, CounterNoise(rows, rows)),
            "reference": lambda: reference_order(logits, exponential.exponential_(generator=generator)),
            "head": lambda: hidden @ head.T,
            "one pass": lambda: logits.amax(dim=1),
        },
        ROUNDS,
    )
    ours, floor = 1e3 * min(seconds["ours"]), 1e3 * min(seconds["one pass"])
    gate = f"weights agree to {gap:.1e}" if gap < 1e-5 else f"WRONG: weights differ by {gap:.1e}"
    found = []
    for case, peer, target in (("reference_order", "reference", 40.0), ("head", "head", 10.0)):
        ratio = best_ratio(seconds[peer], seconds["ours"]) if gap < 1e-5 else 0.0
        detail = (
            f"{peer} {1e3 * min(seconds[peer]):.1f} ms, ours {ours:.2f} ms, floor (one read) {floor:.2f} ms; {gate}"
        )
        found.append(Row(f"sampler/{case}", ratio, target, detail))
    return [row for row in found if names is None or row.name in names]
