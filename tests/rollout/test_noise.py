"""Counter-based noise against arbitrary-precision integers, against its distributions, and its addressing."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.noise import CounterNoise, gumbel_log_density, normal_log_density

MASK = (1 << 64) - 1
GOLDEN, M1, M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def big_mix(word: int) -> int:
    """splitmix64's finaliser on unbounded integers."""
    word = ((word ^ (word >> 30)) * M1) & MASK
    word = ((word ^ (word >> 27)) * M2) & MASK
    return word ^ (word >> 31)


def big_word(seed: int, position: int, token: int, stream: int = 0) -> int:
    """The 64 bits that the module documents, written from its docstring."""
    row = big_mix((seed + GOLDEN) & MASK)
    row = big_mix(row ^ (position * GOLDEN & MASK))
    word = big_mix(row ^ ((token + 1) * M1 & MASK))
    return big_mix(word ^ (stream * M2 & MASK)) if stream else word


def big_uniform(word: int) -> float:
    return ((word >> 12) * 2 + 1) / 2**53


def draws(seed: list[int], position: list[int], ids: list[list[int]]) -> tuple[CounterNoise, torch.Tensor]:
    return CounterNoise(torch.tensor(seed), torch.tensor(position)), torch.tensor(ids)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1), st.lists(st.integers(0, 2**31 - 2), min_size=1, max_size=8)
)
def test_gumbel_equals_the_big_integer_version(seed: int, position: int, ids: list[int]) -> None:
    noise, tokens = draws([seed], [position], [ids])
    want = [-math.log(-math.log(big_uniform(big_word(seed, position, token)))) for token in ids]
    assert noise(tokens)[0].tolist() == pytest.approx(want, rel=2**-23, abs=1e-9)


def test_three_thousand_draws_are_equal_to_one_rounding() -> None:
    generator = random.Random(0)
    seeds = [generator.randrange(2**63) for _ in range(300)]
    positions = [generator.randrange(40_000) for _ in range(300)]
    ids = [[generator.randrange(152_064) for _ in range(10)] for _ in range(300)]
    noise, tokens = draws(seeds, positions, ids)
    want = np.array(
        [
            [-math.log(-math.log(big_uniform(big_word(seed, position, token)))) for token in row]
            for seed, position, row in zip(seeds, positions, ids, strict=True)
        ]
    )
    assert np.array_equal(noise(tokens).numpy(), want.astype(np.float32))


def test_normal_and_gamma_equal_the_big_integer_version() -> None:
    seed, position, ids, shapes = 2**62 + 12345, 77, [0, 5, 151_000], [0.7, 0.02, 1.0]
    noise, tokens = draws([seed], [position], [ids])
    normal = [scipy.stats.norm.ppf(big_uniform(big_word(seed, position, token))) for token in ids]
    assert noise.normal(tokens)[0].tolist() == pytest.approx(normal, rel=1e-6)
    gamma = noise.gamma(tokens, torch.tensor([shapes]))[0].tolist()
    for token, shape, found in zip(ids, shapes, gamma, strict=True):
        d = shape + 2 / 3
        for proposal in range(8):
            x = scipy.stats.norm.ppf(big_uniform(big_word(seed, position, token, 1 + proposal)))
            v = (1 + x / math.sqrt(9 * d)) ** 3
            u = big_uniform(big_word(seed, position, token, 9 + proposal))
            if v > 0 and math.log(u) < 0.5 * x * x + d * (1 - v + math.log(v)):
                break
        want = d * v * big_uniform(big_word(seed, position, token)) ** (1 / shape)
        assert found == pytest.approx(want, rel=1e-6)


def many(count: int) -> tuple[CounterNoise, torch.Tensor]:
    """`count` x 10 draws over several seeds, positions and ids."""
    rows = torch.arange(count)
    return CounterNoise(rows % 7, rows // 7), torch.arange(10).repeat(count, 1) * 3


def test_gumbel_distribution() -> None:
    noise, ids = many(50_000)
    sample = noise(ids).double().flatten().numpy()
    assert scipy.stats.kstest(sample, scipy.stats.gumbel_r.cdf).pvalue > 1e-3
    assert sample.mean() == pytest.approx(0.5772, abs=0.01)
    assert sample.var() == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_normal_distribution() -> None:
    noise, ids = many(20_000)
    assert scipy.stats.kstest(noise.normal(ids).double().flatten().numpy(), scipy.stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize("shape", [0.01, 0.2, 0.9, 1.0])
def test_gamma_distribution(shape: float) -> None:
    noise, ids = many(4_000)
    sample = noise.gamma(ids, torch.full(ids.shape, shape)).double().flatten().numpy()
    # Below the smallest fp32 the distribution function is still 0.4 for shape 0.01: compare where both can differ.
    sample, floor = sample[sample > 1e-37], 1e-37
    below = scipy.stats.gamma.cdf(floor, shape)
    assert len(sample) == pytest.approx((1 - below) * ids.numel(), rel=0.03)
    uniform = (scipy.stats.gamma.cdf(sample, shape) - below) / (1 - below)
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_neighbours_are_uncorrelated() -> None:
    noise, ids = many(50_000)
    sample = noise(ids).double().numpy().reshape(-1, 10)
    for left, right in ((sample[:, 0], sample[:, 1]), (sample[:-7, 0], sample[7:, 0]), (sample[:-1, 2], sample[1:, 2])):
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / math.sqrt(len(left))


def test_a_draw_depends_on_seed_position_and_id_only() -> None:
    seeds, positions = torch.tensor([11, 12, 13]), torch.tensor([5, 0, 9])
    ids = torch.tensor([[4, 8, 15], [16, 23, 42], [4, 8, 15]])
    together = CounterNoise(seeds, positions)(ids)
    for row in range(3):
        alone = CounterNoise(seeds[row : row + 1], positions[row : row + 1])(ids[row : row + 1].flip(1))
        assert torch.equal(alone.flip(1)[0], together[row])
    assert together.unique().numel() == 9
    assert torch.equal(CounterNoise(seeds, positions)(ids.to(torch.int32)), together)


def test_extreme_words_stay_finite() -> None:
    top = torch.tensor([-1])  # 64 ones: the largest uniform
    from rollout.noise import _uniform

    uniforms = torch.cat([_uniform(top), _uniform(torch.tensor([0]))])
    assert 0 < uniforms[1] < uniforms[0] < 1
    assert torch.isfinite(-torch.log(-torch.log(uniforms))).all()


def test_log_densities() -> None:
    values = torch.linspace(-3, 8, 50, dtype=torch.float64)
    assert np.allclose(gumbel_log_density(values), scipy.stats.gumbel_r.logpdf(values.numpy()))
    assert np.allclose(normal_log_density(values), scipy.stats.norm.logpdf(values.numpy()))
