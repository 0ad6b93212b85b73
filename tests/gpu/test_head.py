"""The head on a CUDA device: half-precision products with fp32 accumulation, and memory far below the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learner.head import candidate_logits, linear_kl, linear_lse_gather

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROWS, VOCABULARY, WIDTH = 512, 40_000, 256


def make_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).cuda().requires_grad_()
    weight = (0.1 * torch.randn(VOCABULARY, WIDTH, generator=generator)).to(dtype).cuda().requires_grad_()
    ids = torch.randint(0, VOCABULARY, (ROWS, 5), generator=generator).cuda()
    temperature = (torch.rand(ROWS, generator=generator) + 0.5).cuda()
    return hidden, weight, ids, temperature


def scores(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: Tensor) -> list[Tensor]:
    others = (hidden.detach() + 0.1, weight.detach())
    return [
        *linear_lse_gather(hidden, weight, ids, temperature=temperature, entropy=True),
        candidate_logits(hidden, weight, ids),
        linear_kl(hidden, weight, *others, temperature=temperature),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_equal_float64_of_the_same_numbers(dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs[:2]]
    ours, expected = scores(*inputs), scores(*wide, *inputs[2:])
    for value, wanted in zip(ours[:-1], expected[:-1], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted, atol=2e-3, rtol=2e-4)
    assert ours[-1].isfinite().all()  # its reference was rounded to another type
    gradients = torch.autograd.grad(sum(value.sum() for value in ours[:-1]), inputs[:2])
    wanted_gradients = torch.autograd.grad(sum(value.sum() for value in expected[:-1]), wide)
    for value, wanted in zip(gradients, wanted_gradients, strict=True):
        assert value.dtype == dtype
        assert float((value.double() - wanted).norm() / wanted.norm()) < 1e-2


def test_memory_is_far_below_the_logits() -> None:
    rows, vocabulary = 8192, 150_000
    hidden = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, vocabulary, (rows, 1), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    at_ids, log_normaliser, _ = linear_lse_gather(hidden, weight, ids, entropy=True)
    (at_ids.squeeze(-1) - log_normaliser).sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < rows * vocabulary * 2 / 2
