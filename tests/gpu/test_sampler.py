"""The sampler on a CUDA device: equal to the CPU, inside a CUDA graph, and fused by torch.compile."""

from __future__ import annotations

import pytest
import torch

from rollout.noise import CounterNoise
from rollout.soft_token import SoftTokenParams, SoftTokens, mix_embeddings, perturbed_values, sample_soft_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FIELDS = ("ids", "perturbed", "weights", "retained", "logprobs", "noise")
BATCH, VOCABULARY, HIDDEN = 48, 151_936, 1536
NOISE_SCALE = 0.7


def settings(device: str, family: str = "gumbel") -> SoftTokenParams:
    def row(value: float) -> torch.Tensor:
        return torch.full((BATCH,), value, device=device)

    return SoftTokenParams(
        temperature=row(0.8),
        top_k=torch.full((BATCH,), 5, device=device),
        top_p=row(0.95),
        min_p=row(0.01),
        gumbel_temperature=row(0.1),
        noise_scale=row(NOISE_SCALE),
        noise=family,
        censor_delta=1e-3 if family == "gumbel" else None,
    )


def noise(device: str, position: int = 7) -> CounterNoise:
    return CounterNoise(torch.arange(BATCH, device=device), torch.full((BATCH,), position, device=device))


def random_logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (4 * torch.randn(BATCH, VOCABULARY, generator=torch.Generator().manual_seed(0))).to(dtype)


def assert_close(found: SoftTokens, want: SoftTokens) -> None:
    """The devices' logarithms may differ in the last fp64 bit: one fp32 rounding."""
    for name in FIELDS:
        a, b = getattr(found, name).cpu(), getattr(want, name).cpu()
        if name in ("ids", "retained"):
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gumbel", "gaussian", "dirichlet", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_cpu(family: str, dtype: torch.dtype) -> None:
    logits = random_logits(dtype)
    found = sample_soft_tokens(logits.cuda(), settings("cuda", family), noise("cuda"))
    assert_close(found, sample_soft_tokens(logits, settings("cpu", family), noise("cpu")))


def test_inside_a_cuda_graph() -> None:
    logits, params = random_logits().cuda(), settings("cuda")
    seed, position = torch.arange(BATCH, device="cuda"), torch.zeros(BATCH, dtype=torch.int64, device="cuda")
    table = torch.randn(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[SoftTokens, torch.Tensor]:
        tokens = sample_soft_tokens(logits, params, CounterNoise(seed, position))
        return tokens, mix_embeddings(table, tokens.ids, tokens.weights)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, mixed = step()
    for value in (0, 3):
        position.fill_(value)
        logits.copy_(logits.roll(1, dims=0))
        graph.replay()
        tokens, embedding = step()
        for name in FIELDS:
            assert torch.equal(getattr(captured, name), getattr(tokens, name)), name
        assert torch.equal(mixed, embedding)


def test_no_host_synchronisation() -> None:
    logits, params, draws = random_logits().cuda(), settings("cuda"), noise("cuda")
    sample_soft_tokens(logits, params, draws)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_soft_tokens(logits, params, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fused_by_compile() -> None:
    compiled = torch.compile(sample_soft_tokens, fullgraph=True, dynamic=True)
    logits, params = random_logits().cuda(), settings("cuda")
    found = compiled(logits, params, noise("cuda"))
    assert_close(found, sample_soft_tokens(logits, params, noise("cuda")))
    # What the learner makes on a CPU of the stored numbers: Triton contracts a product and a sum to one operation.
    assert torch.equal(found.perturbed.cpu(), perturbed_values(found.logprobs.cpu(), found.noise.cpu(), NOISE_SCALE))
