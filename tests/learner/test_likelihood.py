"""Likelihoods: golden vectors of the released code, float64 closed forms, and the identities of the mathematics."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.likelihood import LIKELIHOODS, soft_log_density, soft_log_ratio

GOLDEN = Path(__file__).parent / "golden" / "likelihood.npz"
GUMBEL_FAMILY = ["gumbel", "concrete", "censored", "argmax"]
GOLDEN_CASES = [
    "gumbel_onpolicy",
    "gumbel_offpolicy_0.01",
    "gumbel_offpolicy_0.1",
    "gaussian_onpolicy",
    "gaussian_offpolicy_0.1",
    "dirichlet_onpolicy",
    "dirichlet_offpolicy_0.1",
]
CLAMP_BOUNDARY_ROWS = {"gumbel_onpolicy": [7, 8, 11, 17]}
"""There rounding alone decides whether the released code's gradient flows."""


def threshold_of(perturbed: Tensor, retained: Tensor, tau: float = 0.1, delta: float = 1e-3) -> Tensor:
    return perturbed.masked_fill(~retained, -torch.inf).amax(-1) + tau * math.log(delta)


def log_probs(logits: Tensor, retained: Tensor, scale: float = 1.0) -> Tensor:
    return (logits / scale).masked_fill(~retained, -torch.inf).log_softmax(-1)


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-300, 1 - 1e-16)
    return -torch.log(-torch.log(uniform))


def draw(
    rows: int, candidates: int, seed: int, *, scale: float = 1.0, spread: float = 2.0, drop: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Old logits, perturbed values drawn from them, retained mask; float64."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, candidates, generator=generator, dtype=torch.float64) * spread
    retained = torch.rand(rows, candidates, generator=generator) > drop
    retained[:, 0] = True
    perturbed = log_probs(old, retained) + scale * gumbel_noise((rows, candidates), generator)
    return old, perturbed.masked_fill(~retained, -torch.inf), retained


def ratio(name: str, new: Tensor, old: Tensor, perturbed: Tensor, retained: Tensor, **options: object) -> Tensor:
    options.setdefault("threshold", threshold_of(perturbed, retained))
    return soft_log_ratio(new, old, perturbed, retained, likelihood=name, **options)  # type: ignore[arg-type]


# --- what the released code computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_reference_matches_the_released_code(case: str) -> None:
    golden = {key.split("/")[1]: value for key, value in np.load(GOLDEN).items() if key.startswith(case + "/")}
    ids = torch.from_numpy(golden["ids"])
    logits = torch.from_numpy(golden["logits"]).requires_grad_()
    soft = ~(ids[:, 1:] == 0).all(-1)
    retained = torch.zeros_like(ids, dtype=torch.bool)  # the released estimator ignores it
    density = soft_log_density(
        logits.gather(-1, ids),
        torch.from_numpy(golden["stored"]),
        retained,
        likelihood="reference",
        noise=case.split("_")[0],  # type: ignore[arg-type]
    )
    density[soft].sum().backward()
    assert soft.sum() >= 12
    torch.testing.assert_close(density[soft], torch.from_numpy(golden["logprob"])[soft], atol=1e-5, rtol=0)
    compared = soft.clone()
    compared[CLAMP_BOUNDARY_ROWS.get(case, [])] = False
    torch.testing.assert_close(
        logits.grad[compared], torch.from_numpy(golden["grad_logits"])[compared], atol=1e-5, rtol=1e-5
    )


def test_reference_is_zero_where_no_candidate_passes_the_mask() -> None:
    flat = torch.zeros(2, 30)
    density = soft_log_density(flat, flat, torch.ones_like(flat, dtype=torch.bool), likelihood="reference")
    assert torch.equal(density, torch.zeros(2))


# --- float64 closed forms, written out candidate by candidate -----------------------------------------------------


def closed_form(name: str, new: list[float], old: list[float], g: list[float], t: float, s: float) -> float:
    """The table of the design for one position with all candidates retained; lists of plain floats."""

    def normalised(logits: list[float], scale: float) -> list[float]:
        total = math.log(sum(math.exp(z / scale) for z in logits))
        return [z / scale - total for z in logits]

    everyone = range(len(g))
    if name == "gumbel":
        l_new, l_old = normalised(new, 1.0), normalised(old, 1.0)
        return sum(
            (l_new[i] - l_old[i]) / s - math.exp(-(g[i] - l_old[i]) / s) * (math.exp((l_new[i] - l_old[i]) / s) - 1)
            for i in everyone
        )
    if name in ("concrete", "censored", "argmax"):
        l_new, l_old = normalised(new, s), normalised(old, s)
        scaled = [value / s for value in g]
        active = [i for i in everyone if name == "concrete" or g[i] >= t]
        if name == "argmax":
            winner = max(everyone, key=lambda i: g[i])
            return l_new[winner] - l_old[winner]

        def rate(log_p: list[float]) -> float:
            seen = sum(math.exp(log_p[i] - scaled[i]) for i in active)
            return seen + (1 - sum(math.exp(log_p[i]) for i in active)) * math.exp(-t / s)

        gain = sum(l_new[i] - l_old[i] for i in active)
        return gain - len(active) * (math.log(rate(l_new)) - math.log(rate(l_old)))
    p_new, p_old = ([math.exp(value) for value in normalised(z, 1.0)] for z in (new, old))
    if name == "gaussian":
        std = 0.05 * s
        return sum(((g[i] - p_old[i]) ** 2 - (g[i] - p_new[i]) ** 2) / (2 * std**2) for i in everyone)
    return sum((p_new[i] - p_old[i]) * math.log(g[i]) - math.lgamma(p_new[i]) + math.lgamma(p_old[i]) for i in everyone)


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("name", ["gumbel", "concrete", "censored", "argmax", "gaussian", "dirichlet"])
def test_ratio_equals_its_closed_form(name: str, scale: float) -> None:
    old, perturbed, retained = draw(40, 4, seed=3, scale=scale, drop=0.0, spread=1.0)
    generator = torch.Generator().manual_seed(4)
    new = old + torch.randn(old.shape, generator=generator, dtype=torch.float64) * 0.3
    if name in ("gaussian", "dirichlet"):
        perturbed = torch.rand(old.shape, generator=generator, dtype=torch.float64) + 1e-3
    threshold = threshold_of(perturbed, retained, tau=0.3, delta=1e-2)
    expected = [
        closed_form(name, new[i].tolist(), old[i].tolist(), perturbed[i].tolist(), float(threshold[i]), scale)
        for i in range(40)
    ]
    options = {"noise_scale": scale, "threshold": threshold}
    actual = ratio(name, new, old, perturbed, retained, **options)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=1e-10)
    single = ratio(name, new.float(), old.float(), perturbed.float(), retained, noise_scale=scale, threshold=threshold)
    torch.testing.assert_close(single.double(), actual, atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_ratio_is_the_difference_of_densities(name: str) -> None:
    old, perturbed, retained = draw(200, 5, seed=5)
    new = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if name in ("gaussian", "dirichlet"):
        perturbed = perturbed.abs()
    options = {"threshold": threshold_of(perturbed, retained), "noise_scale": 0.8}

    def density(logits: Tensor) -> Tensor:
        return soft_log_density(logits, perturbed, retained, likelihood=name, **options)  # type: ignore[arg-type]

    difference = density(new) - density(old)
    torch.testing.assert_close(ratio(name, new, old, perturbed, retained, **options), difference, atol=1e-9, rtol=1e-9)


def test_gumbel_density_is_that_of_the_noise() -> None:
    old, perturbed, retained = draw(50, 5, seed=8)
    noise = torch.where(retained, perturbed - log_probs(old, retained), 0.0)
    expected = torch.where(retained, -noise - torch.exp(-noise), 0.0).sum(-1)
    actual = soft_log_density(old, perturbed, retained, likelihood="gumbel")
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("name", "scale"), [("gumbel", 0.7), ("concrete", 1.0), ("concrete", 0.7)])
def test_density_integrates_to_one(name: str, scale: float) -> None:
    """Two candidates: over the plane for `gumbel`, over the difference g_0 - g_1 for `concrete`."""
    logits = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
    axis = torch.linspace(-12, 30, 1001, dtype=torch.float64)
    step = float(axis[1] - axis[0])
    if name == "gumbel":
        points, cell = torch.cartesian_prod(axis, axis), step**2
    else:
        axis = torch.linspace(-40, 40, 4001, dtype=torch.float64)
        points, cell = torch.stack([axis, torch.zeros_like(axis)], -1), float(axis[1] - axis[0])
    retained = torch.ones_like(points, dtype=torch.bool)
    density = soft_log_density(
        logits.expand_as(points),
        points,
        retained,
        likelihood=name,  # type: ignore[arg-type]
        noise_scale=scale,
    )
    assert float(density.exp().sum()) * cell == pytest.approx(1.0, abs=2e-3)


def test_gaussian_and_dirichlet_densities_are_those_of_torch() -> None:
    old, _, retained = draw(60, 5, seed=11, spread=1.0)
    generator = torch.Generator().manual_seed(2)
    draws = torch.rand(old.shape, generator=generator, dtype=torch.float64) + 1e-6
    p = log_probs(old, retained).exp()
    normal = torch.distributions.Normal(p, 0.05 * 0.5).log_prob(draws)
    expected = torch.where(retained, normal, 0.0).sum(-1)
    actual = soft_log_density(old, draws, retained, likelihood="gaussian", noise_scale=0.5)
    torch.testing.assert_close(actual, expected)
    shape = torch.where(retained, p, 1.0)
    gamma = torch.distributions.Gamma(shape, torch.ones_like(shape)).log_prob(draws)
    expected = torch.where(retained, gamma, 0.0).sum(-1)
    torch.testing.assert_close(soft_log_density(old, draws, retained, likelihood="dirichlet"), expected)


def test_dirichlet_ratio_is_that_of_the_normalised_weights() -> None:
    """What the model sees is x / sum(x): a Dirichlet draw, whatever the total."""
    old, _, retained = draw(60, 5, seed=12, drop=0.0, spread=1.0)
    new = old + 0.5 * torch.randn(old.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    draws = torch.rand(old.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 1e-3
    weights = draws / draws.sum(-1, keepdim=True)
    expected = torch.distributions.Dirichlet(new.softmax(-1)).log_prob(weights)
    expected = expected - torch.distributions.Dirichlet(old.softmax(-1)).log_prob(weights)
    torch.testing.assert_close(ratio("dirichlet", new, old, draws, retained), expected, atol=1e-9, rtol=1e-9)


def test_dirichlet_scores_underflowed_draws_by_their_probability() -> None:
    old = torch.tensor([[5.0, -5.0]])
    new = torch.tensor([[4.0, -4.0]])
    retained = torch.ones(1, 2, dtype=torch.bool)
    actual = ratio("dirichlet", new, old, torch.tensor([[1.2, 0.0]]), retained)
    p_new, p_old = new.double().softmax(-1)[0], old.double().softmax(-1)[0]
    expected = (p_new[0] - p_old[0]) * math.log(1.2) - torch.lgamma(p_new[0]) + torch.lgamma(p_old[0])
    expected += (p_new[1] - p_old[1]) * math.log(1e-37) - torch.lgamma(p_new[1] + 1) + torch.lgamma(p_old[1] + 1)
    assert float(actual) == pytest.approx(float(expected), rel=1e-4)


# --- identities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "drift"), [("gumbel", 0.15), ("concrete", 0.6), ("censored", 0.6), ("argmax", 0.6)])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_expected_ratio_is_one(name: str, drift: float, scale: float) -> None:
    """Under the old policy; `gumbel` only while no candidate falls by 0.3 nats (its variance is infinite at ln 2)."""
    number = 400_000
    direction = torch.tensor([1.0, -1.0, 0.5, -0.7, 0.4], dtype=torch.float64)
    old = torch.tensor([0.826, 0.112, 0.041, 0.015, 0.006], dtype=torch.float64).log()
    new = old + drift * direction
    retained = torch.ones(number, 5, dtype=torch.bool)
    noise = gumbel_noise((number, 5), torch.Generator().manual_seed(0))
    perturbed = old.log_softmax(-1) + scale * noise
    r = ratio(name, new.expand(number, 5), old.expand(number, 5), perturbed, retained, noise_scale=scale).exp()
    error = float(r.std()) / math.sqrt(number)
    assert abs(float(r.mean()) - 1) < 4.5 * error
    assert error < 0.01


@pytest.mark.parametrize("name", ["gumbel", "concrete", "censored"])
def test_given_the_winner_the_expected_ratio_is_the_discrete_one(name: str) -> None:
    """Rao-Blackwell: each likelihood is the conditional expectation of the ones above it, `argmax` of all of them."""
    number = 300_000
    old = torch.tensor([1.0, 0.4, 0.0, -0.5], dtype=torch.float64)
    new = old + torch.tensor([0.1, -0.15, 0.1, -0.1], dtype=torch.float64)
    retained = torch.ones(number, 4, dtype=torch.bool)
    perturbed = old.log_softmax(-1) + gumbel_noise((number, 4), torch.Generator().manual_seed(1))
    r = ratio(name, new.expand(number, 4), old.expand(number, 4), perturbed, retained).exp()
    winner = perturbed.argmax(-1)
    for candidate in range(4):
        drawn = r[winner == candidate]
        expected = float((new.log_softmax(-1) - old.log_softmax(-1))[candidate].exp())
        assert abs(float(drawn.mean()) - expected) < 4.5 * float(drawn.std()) / math.sqrt(drawn.numel())


def test_variance_falls_from_gumbel_to_argmax() -> None:
    number = 100_000
    old = torch.tensor([0.826, 0.112, 0.041, 0.015, 0.006], dtype=torch.float64).log()
    new = old + 0.3 * torch.tensor([1.0, -1.0, 0.5, -0.7, 0.4], dtype=torch.float64)
    retained = torch.ones(number, 5, dtype=torch.bool)
    perturbed = old + gumbel_noise((number, 5), torch.Generator().manual_seed(2))
    deviations = {
        name: float(ratio(name, new.expand(number, 5), old.expand(number, 5), perturbed, retained).std())
        for name in GUMBEL_FAMILY
    }
    measured = {"gumbel": 0.568, "concrete": 0.454, "censored": 0.252, "argmax": 0.197}
    assert deviations == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("name", GUMBEL_FAMILY)
def test_expected_score_is_zero(name: str) -> None:
    number = 200_000
    logits = torch.tensor([1.0, 0.4, 0.0, -0.5], dtype=torch.float64)
    policy = logits.expand(number, 4).clone().requires_grad_()
    perturbed = logits.log_softmax(-1) + gumbel_noise((number, 4), torch.Generator().manual_seed(3))
    retained = torch.ones(number, 4, dtype=torch.bool)
    ratio(name, policy, logits.expand(number, 4), perturbed, retained).sum().backward()
    score = policy.grad
    assert (score.mean(0).abs() < 4.5 * score.std(0) / math.sqrt(number)).all()


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_censored_at_delta_one_is_the_discrete_ratio(scale: float) -> None:
    """Sample by sample: the active set is the winner, and S does not depend on the policy."""
    old, perturbed, retained = draw(500, 5, seed=21, scale=scale)
    new = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    winner = perturbed.argmax(-1, keepdim=True)
    discrete = (log_probs(new, retained, scale) - log_probs(old, retained, scale)).gather(-1, winner).squeeze(-1)
    options = {"threshold": threshold_of(perturbed, retained, delta=1.0), "noise_scale": scale}
    censored = ratio("censored", new, old, perturbed, retained, **options)
    torch.testing.assert_close(censored, discrete, atol=1e-14, rtol=0)
    assert torch.equal(ratio("argmax", new, old, perturbed, retained, noise_scale=scale), discrete)


def test_censored_without_threshold_is_concrete() -> None:
    old, perturbed, retained = draw(300, 5, seed=22)
    new = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    nothing_censored = torch.full((300,), torch.nan, dtype=torch.float64)
    torch.testing.assert_close(
        ratio("censored", new, old, perturbed, retained, threshold=nothing_censored),
        ratio("concrete", new, old, perturbed, retained),
        atol=1e-12,
        rtol=1e-12,
    )
    with pytest.raises(ValueError, match="needs the threshold"):
        soft_log_ratio(new, old, perturbed, retained, likelihood="censored")


def test_censored_ignores_the_values_below_the_threshold() -> None:
    """The executed mixture does not contain them, so neither may the likelihood."""
    old, perturbed, retained = draw(300, 5, seed=23)
    new = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    threshold = threshold_of(perturbed, retained)
    invisible = retained & (perturbed < threshold[:, None])
    assert invisible.any(-1).float().mean() > 0.5
    moved = torch.where(invisible, perturbed - 3.0, perturbed)
    before, after = (ratio("censored", new, old, g, retained, threshold=threshold) for g in (perturbed, moved))
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["concrete", "censored", "argmax"])
def test_a_common_shift_of_the_perturbed_values_changes_nothing(name: str) -> None:
    old, perturbed, retained = draw(300, 5, seed=24)
    new = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    torch.testing.assert_close(
        ratio(name, new, old, perturbed, retained),
        ratio(name, new, old, perturbed + 1.7, retained),
        atol=1e-12,
        rtol=1e-12,
    )
    shifted = ratio("gumbel", new, old, perturbed + 1.7, retained)
    assert not torch.allclose(shifted, ratio("gumbel", new, old, perturbed, retained))


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_logits_are_used_up_to_a_constant(name: str) -> None:
    old, perturbed, retained = draw(100, 5, seed=25)
    new = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    perturbed = perturbed.abs() if name in ("gaussian", "dirichlet") else perturbed
    expected = ratio(name, new, old, perturbed, retained)
    torch.testing.assert_close(ratio(name, new + 5, old - 7, perturbed, retained), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["gumbel", "concrete"])
def test_the_temperature_of_the_mixture_cancels(name: str) -> None:
    """y = softmax(g / tau) gives g back up to a shift as tau log y, so no tau can appear in the ratio."""
    old, perturbed, retained = draw(200, 4, seed=26, drop=0.0)
    new = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = ratio(name, new, old, perturbed, retained)
    for tau in (0.25, 1.0):
        recovered = tau * (perturbed / tau).log_softmax(-1)
        if name == "gumbel":  # the shift is part of this likelihood: put it back
            recovered = recovered + (perturbed - recovered)[:, :1]
        torch.testing.assert_close(ratio(name, new, old, recovered, retained), expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_the_order_of_candidates_does_not_matter(name: str) -> None:
    old, perturbed, retained = draw(100, 5, seed=27)
    new = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    if name in ("gaussian", "dirichlet"):
        perturbed = perturbed.abs()
    permutation = torch.tensor([3, 0, 4, 1, 2])
    moved = ratio(name, new[:, permutation], old[:, permutation], perturbed[:, permutation], retained[:, permutation])
    torch.testing.assert_close(moved, ratio(name, new, old, perturbed, retained), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("padding", [0.0, -torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("name", [name for name in LIKELIHOODS if name != "reference"])
def test_filtered_candidates_change_nothing(name: str, padding: float) -> None:
    """Neither the value nor the gradient, whatever garbage stands in their columns."""
    old, perturbed, _ = draw(50, 3, seed=28, drop=0.0)
    perturbed = perturbed.abs() if name in ("gaussian", "dirichlet") else perturbed
    new = (old + 0.5 * torch.randn(old.shape, dtype=torch.float64)).requires_grad_()
    short = ratio(name, new, old, perturbed, torch.ones_like(old, dtype=torch.bool))
    short.sum().backward()
    garbage = torch.randn(50, 2, dtype=torch.float64) * 20
    wide_new = torch.cat([new.detach(), garbage], -1).requires_grad_()
    wide_g = torch.cat([perturbed, torch.full((50, 2), padding, dtype=torch.float64)], -1)
    retained = torch.tensor([True, True, True, False, False]).expand(50, 5)
    threshold = threshold_of(perturbed, torch.ones_like(perturbed, dtype=torch.bool))
    wide = ratio(name, wide_new, torch.cat([old, -garbage], -1), wide_g, retained, threshold=threshold)
    wide.sum().backward()
    torch.testing.assert_close(wide, short, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(wide_new.grad[:, :3], new.grad, atol=1e-10, rtol=1e-10)
    assert torch.equal(wide_new.grad[:, 3:], torch.zeros(50, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_changes_of_thirty_nats_stay_finite(name: str, dtype: torch.dtype) -> None:
    """Value and gradient, for every pair of extreme candidates; results are fp32 for every input type."""
    old, perturbed, retained = draw(4000, 5, seed=29)
    if name in ("gaussian", "dirichlet"):
        perturbed = perturbed.abs().clamp(max=3)
    change = (torch.rand(old.shape, generator=torch.Generator().manual_seed(30), dtype=torch.float64) * 2 - 1) * 30
    change[:200] = change[:200].sign() * 30
    new = (old + change).to(dtype).requires_grad_()
    result = ratio(name, new, old.to(dtype), perturbed.float(), retained)
    result.sum().backward()
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    assert new.grad.isfinite().all()


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_equal_policies_have_ratio_exactly_one(name: str) -> None:
    old, perturbed, retained = draw(300, 5, seed=31)
    perturbed = perturbed.abs() if name in ("gaussian", "dirichlet") else perturbed
    result = ratio(name, old.float(), old.float(), perturbed.float(), retained)
    assert torch.equal(result, torch.zeros(300))


@pytest.mark.parametrize("name", GUMBEL_FAMILY)
def test_a_single_candidate_carries_no_gradient(name: str) -> None:
    """With one candidate retained the step was deterministic."""
    old, perturbed, _ = draw(20, 5, seed=32, drop=0.0)
    retained = torch.zeros(20, 5, dtype=torch.bool)
    retained[:, 0] = True
    new = torch.randn(20, 5, dtype=torch.float64).requires_grad_()
    result = ratio(name, new, old, perturbed, retained)
    result.sum().backward()
    torch.testing.assert_close(result, torch.zeros(20, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(new.grad, torch.zeros_like(old), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_gradients_in_float64(name: str) -> None:
    old, perturbed, retained = draw(8, 5, seed=33, spread=1.0)
    perturbed = perturbed.abs() if name in ("gaussian", "dirichlet") else perturbed
    new = (old + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ratio(name, z, old, perturbed, retained), (new,))


def test_gradients_on_policy_are_the_documented_scores() -> None:
    """1 - K w (concrete), 1_A - m u (censored), e_i - p (argmax), a_j - p_j sum(a) (gumbel)."""
    old, g, retained = draw(50, 4, seed=34, drop=0.0, spread=1.0)
    p, threshold = old.softmax(-1), threshold_of(g, retained)
    active = g >= threshold[:, None]
    a = 1 - torch.exp(-(g - old.log_softmax(-1)))
    w = (old.log_softmax(-1) - g).softmax(-1)
    u = (old.log_softmax(-1) - torch.maximum(g, threshold[:, None])).softmax(-1)
    expected = {
        "gumbel": a - p * a.sum(-1, keepdim=True),
        "concrete": 1 - 4 * w,
        "censored": active.double() - active.sum(-1, keepdim=True) * u,
        "argmax": torch.nn.functional.one_hot(g.argmax(-1), 4) - p,
    }
    for name, score in expected.items():
        new = old.clone().requires_grad_()
        ratio(name, new, old, g, retained).sum().backward()
        torch.testing.assert_close(new.grad, score, atol=1e-10, rtol=1e-10)
