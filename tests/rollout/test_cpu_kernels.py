"""The kernels for machines without Triton: what vLLM's own would compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout import cpu_kernels, cpu_sampling


def test_inverse_cdf_is_the_textbook_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 1300, generator=generator) * 3
    logits[5:9, 100:] = float("-inf")
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform[:, None], right=True)[:, 0]
    found = cpu_sampling.inverse_cdf(logits, uniform)
    margin = (cumulative - uniform[:, None]).abs().amin(-1)
    assert (margin > 1e-6).sum() >= 35
    assert torch.equal(found[margin > 1e-6], expected[margin > 1e-6])


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 1.0 - 2.0**-53])
def test_inverse_cdf_never_leaves_the_support(uniform: float) -> None:
    logits = torch.full((3, 1100), float("-inf"))
    logits[0, 7], logits[1, 600], logits[2, 1099] = 0.0, 5.0, -80.0
    found = cpu_sampling.inverse_cdf(logits, torch.full((3,), uniform, dtype=torch.float64))
    assert found.tolist() == [7, 600, 1099]


def test_drawn_tokens_follow_the_distribution() -> None:
    """Chi-square over 10^5 draws of one distribution, one seed and 10^5 positions; 5 % level of 9 degrees is 16.9."""
    count = 100_000
    p = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.05, 0.04, 0.03, 0.02, 0.007, 0.003], dtype=torch.float64)
    uniform = cpu_sampling.uniform_draws(torch.full((count,), 12345), torch.arange(count))
    tokens = cpu_sampling.inverse_cdf(p.log().float().expand(count, -1), uniform)
    observed = torch.bincount(tokens, minlength=10).double()
    assert float(((observed - count * p) ** 2 / (count * p)).sum()) < 27.9  # 0.1 % level
    assert abs(float(np.corrcoef(uniform[1:], uniform[:-1])[0, 1])) < 0.01


def test_uniform_draws_against_big_integers() -> None:
    def mixed(word: int) -> int:
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    seeds, positions = torch.tensor([0, 5, 2**63 - 1]), torch.tensor([0, 17, 100_000])
    for seed, position, found in zip(
        seeds.tolist(), positions.tolist(), cpu_sampling.uniform_draws(seeds, positions).tolist(), strict=True
    ):
        word = mixed((seed + 0xD1B54A32D192ED03) % 2**64)
        word = mixed(word ^ ((position + 1) * 0x9E3779B97F4A7C15 % 2**64))
        assert found == ((word >> 11) + 0.5) * 2.0**-53


def test_greedy_and_drawn_rows_share_a_launch() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0], [2.0, 0.0, 0.0]])
    temperature = torch.tensor([1.0, 0.0, 0.5])
    argmax, maximum = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1)
    rows, seeds, positions = torch.tensor([1, 0, 2]), torch.tensor([3, 4, 5]), torch.tensor([9, 9, 9])
    arguments = (argmax, 1, maximum, 1, None, 0, 0, None, None, 0, logits, 3, rows, seeds, positions, temperature, 3)
    cpu_sampling.sample_tokens(*arguments, APPLY_TEMPERATURE=True)
    uniform = cpu_sampling.uniform_draws(seeds[rows], positions)
    assert argmax[0, 0] == 1
    assert argmax[1:, 0].tolist() == [
        int(cpu_sampling.inverse_cdf(logits[1:2], uniform[1:2])[0]),
        int(cpu_sampling.inverse_cdf(logits[2:] / 0.5, uniform[2:])[0]),
    ]


def test_staged_writes_and_logprobs() -> None:
    table = torch.zeros(3, 6, dtype=torch.int32)
    cpu_kernels.apply_write(
        table, 6, torch.tensor([2, 0]), torch.tensor([1, 0]), torch.tensor([7, 8, 9]), torch.tensor([2, 3]), None
    )
    assert table.tolist() == [[9, 0, 0, 0, 0, 0], [0] * 6, [0, 7, 8, 0, 0, 0]]
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[3, 4], [0, 49], [7, 7], [1, 2]])
    scores, ranks = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    cpu_sampling.log_softmax_at(scores, logits, 50, ids, 2, 2, 50)
    torch.testing.assert_close(scores, torch.log_softmax(logits, -1).gather(1, ids))
    cpu_sampling.token_ranks(ranks, logits, 50, ids[:, 0], 50)
    order = logits.argsort(-1, descending=True)
    assert [int(order[row, ranks[row] - 1]) for row in range(4)] == ids[:, 0].tolist()
