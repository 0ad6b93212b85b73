"""The head: equality with the naive logits, gradcheck, half types, partitioned weights, never [T, V]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from learner import head
from learner.embedding import replay_embeddings, soft_input_embeddings
from learner.head import candidate_logits, linear_kl, linear_lse_gather


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several vocabulary slices and row blocks also at test sizes, none of them even."""
    monkeypatch.setattr(head, "SLICE_BOUNDS", (128, 128))
    monkeypatch.setattr(head, "CANDIDATE_WORKSPACE_BYTES", {"cpu": 1000})


def inputs(
    rows: int = 23, vocabulary: int = 301, width: int = 12, candidates: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    ids = torch.randint(0, vocabulary, (rows, candidates), generator=generator)
    ids[:, 1] = ids[:, 0]  # duplicates within a row
    ids[::2] = ids[0]  # and across rows
    ids[0, -2:] = torch.tensor([0, vocabulary - 1])
    temperature = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5
    return hidden, weight, ids, temperature


def naive(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden @ weight.t() / temperature.unsqueeze(-1)
    return logits.gather(-1, ids), logits.logsumexp(-1), Categorical(logits=logits).entropy()


def upstream(*outputs: Tensor) -> Tensor:
    """A scalar with a different gradient for every output entry."""
    return sum(((out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum() for out in outputs), torch.tensor(0.0))


def test_values_and_gradients_equal_the_naive_ones() -> None:
    hidden, weight, ids, temperature = inputs()
    ours = linear_lse_gather(hidden, weight, ids, temperature=temperature, entropy=True)
    gradients = torch.autograd.grad(upstream(*ours), (hidden, weight))
    expected = naive(hidden, weight, ids, temperature)
    for value, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-12)
    for value, wanted in zip(gradients, torch.autograd.grad(upstream(*expected), (hidden, weight)), strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-12)
    logits = candidate_logits(hidden, weight, ids)
    gradients = torch.autograd.grad(upstream(logits), (hidden, weight))
    expected_logits = (hidden @ weight.t()).gather(-1, ids)
    torch.testing.assert_close(logits, expected_logits, atol=1e-12, rtol=1e-12)
    wanted_gradients = torch.autograd.grad(upstream(expected_logits), (hidden, weight))
    for value, wanted in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, ids, temperature = inputs(rows=3, vocabulary=131, width=3, candidates=3)
    other_hidden, other_weight = torch.randn_like(hidden), torch.randn_like(weight)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_lse_gather(h, w, ids, temperature=temperature, entropy=True), (hidden, weight)
    )
    assert torch.autograd.gradcheck(lambda h, w: linear_lse_gather(h, w, ids), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: candidate_logits(h, w, ids), (hidden, weight))
    assert torch.autograd.gradcheck(
        lambda h, w: linear_kl(h, w, other_hidden, other_weight, temperature=temperature), (hidden, weight)
    )


def test_exact_kl_over_the_vocabulary() -> None:
    hidden, weight, _, temperature = inputs()
    other_hidden, other_weight = torch.randn_like(hidden), torch.randn_like(weight)
    kl = linear_kl(hidden, weight, other_hidden, other_weight, temperature=temperature)
    policy = Categorical(logits=hidden @ weight.t() / temperature[:, None])
    reference = Categorical(logits=other_hidden @ other_weight.t() / temperature[:, None])
    torch.testing.assert_close(kl, kl_divergence(policy, reference), atol=1e-12, rtol=1e-12)
    same = linear_kl(hidden, weight, hidden, weight)
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_narrow_types_accumulate_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    """Results are fp32; gradients have the input's type and one rounding."""
    hidden, weight, ids, temperature = inputs(dtype=dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    ours = linear_lse_gather(hidden, weight, ids, temperature=temperature, entropy=True)
    ours = (*ours, candidate_logits(hidden, weight, ids))
    expected = naive(wide[0], wide[1], ids, temperature)
    expected = (*expected, (wide[0] @ wide[1].t()).gather(-1, ids))
    for value, wanted in zip(ours, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted, atol=2e-5, rtol=2e-5)
    gradients = torch.autograd.grad(upstream(*ours), (hidden, weight))
    for value, wanted in zip(gradients, torch.autograd.grad(upstream(*expected), wide), strict=True):
        assert value.dtype == dtype
        assert float((value.double() - wanted).norm() / wanted.norm()) < tolerance


def test_frequent_tokens_keep_their_gradient_in_bf16() -> None:
    """4000 positions with the same id: a running sum in bf16 stops growing at 256."""
    hidden = torch.ones(4000, 4, dtype=torch.bfloat16)
    weight = torch.zeros(9, 4, dtype=torch.bfloat16, requires_grad=True)
    candidate_logits(hidden, weight, torch.full((4000, 2), 3)).sum().backward()
    torch.testing.assert_close(weight.grad[3].float(), torch.full((4,), 8000.0), rtol=4e-3, atol=0)


def test_one_number_as_temperature() -> None:
    hidden, weight, ids, _ = inputs()
    for value, wanted in zip(
        linear_lse_gather(hidden, weight, ids, temperature=0.7),
        naive(hidden, weight, ids, torch.full((23,), 0.7, dtype=torch.float64))[:2],
        strict=True,
    ):
        torch.testing.assert_close(value, wanted)


def test_extreme_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    logits, lse, entropy = linear_lse_gather(hidden, weight, torch.tensor([[0], [1]]), entropy=True)
    (logits.sum() + lse.sum() + entropy.sum()).backward()
    torch.testing.assert_close(lse, torch.tensor([300.0, 300.0]))
    assert entropy.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_no_rows() -> None:
    _, weight, ids, _ = inputs()
    hidden = torch.zeros(0, 12, dtype=torch.float64, requires_grad=True)
    gathered, lse, entropy = linear_lse_gather(hidden, weight, ids[:0], entropy=True)
    assert gathered.shape == (0, 5)
    upstream(gathered, lse, entropy, candidate_logits(hidden, weight, ids[:0])).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_partitioned_weight_is_whole_only_inside_the_hook() -> None:
    """As under ZeRO-3: outside the context the parameter is an empty tensor, also between forward and backward."""
    hidden, whole, ids, _ = inputs()
    weight = torch.nn.Parameter(whole.detach().clone())
    accumulator = weight.expand_as(weight).grad_fn  # created while the parameter is whole, as DeepSpeed does
    entered = []

    @contextmanager
    def gather(parameter: Tensor) -> Iterator[None]:
        parameter.data = whole.detach().clone()
        entered.append(1)
        yield
        parameter.data = torch.empty(0, dtype=parameter.dtype)

    weight.data = torch.empty(0, dtype=weight.dtype)
    gathered, lse = linear_lse_gather(hidden, weight, ids, gather=gather)
    logits = candidate_logits(hidden, weight, ids, gather=gather)
    kl = linear_kl(
        hidden, weight, torch.zeros_like(hidden), whole, gather=lambda w: gather(w) if w is weight else memo(w)
    )
    assert weight.numel() == 0
    ours = torch.autograd.grad(upstream(gathered, lse, logits, kl), (hidden, weight))
    assert accumulator is not None
    assert len(entered) == 6
    expected = (*linear_lse_gather(hidden, whole, ids), candidate_logits(hidden, whole, ids))
    expected = (*expected, linear_kl(hidden, whole, torch.zeros_like(hidden), whole))
    for value, wanted in zip(ours, torch.autograd.grad(upstream(*expected), (hidden, whole)), strict=True):
        torch.testing.assert_close(value, wanted)


@contextmanager
def memo(weight: Tensor) -> Iterator[None]:
    yield


def test_memory_is_far_below_the_logits() -> None:
    """Nothing of T x V entries is allocated in forward or backward (the profiler sees every allocation)."""
    rows, vocabulary = 64, 20_000
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    ids = torch.randint(0, vocabulary, (rows, 5))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for outputs in (linear_lse_gather(hidden, weight, ids, entropy=True), (candidate_logits(hidden, weight, ids),)):
            upstream(*outputs).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    gradient = weight.numel() * 4
    assert gradient <= largest < 1.05 * gradient < rows * vocabulary * 4 / 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_soft_input_embeddings(dtype: torch.dtype) -> None:
    """Summed in fp32 and rounded once."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(50, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    ids = torch.randint(0, 50, (40, 5), generator=generator)
    weights = torch.rand(40, 5, generator=generator).softmax(-1)
    weights[:, 3:] = 0.0
    mixture = soft_input_embeddings(table, ids, weights)
    assert mixture.dtype == dtype
    assert not mixture.requires_grad
    exact = (table.detach().double()[ids] * weights.double().unsqueeze(-1)).sum(1)
    rounding = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(mixture.double(), exact, rtol=rounding * 1.01, atol=1e-6)
    differentiable = soft_input_embeddings(table, ids, weights, differentiable=True)
    assert torch.equal(differentiable, mixture)
    differentiable.double().sum().backward()
    expected = torch.zeros(50, dtype=torch.float64).index_add(0, ids.flatten(), weights.double().flatten())
    torch.testing.assert_close(table.grad.double()[:, 0], expected, rtol=2e-2, atol=1e-5)


def test_replayed_inputs_mix_tokens_and_mixtures() -> None:
    table = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    input_ids = torch.tensor([3, 4, 5, 6])
    rows, ids, weights = torch.tensor([1, 3]), torch.tensor([[7, 8], [9, 9]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    embedded = replay_embeddings(table, input_ids, rows, ids, weights)
    expected = torch.stack([table[3], 0.25 * table[7] + 0.75 * table[8], table[5], table[9]])
    torch.testing.assert_close(embedded, expected)
    embedded.sum().backward()
    touched = table.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert touched == [3, 5]
    assert torch.equal(replay_embeddings(table, input_ids, rows[:0], ids[:0], weights[:0]), table[input_ids])
