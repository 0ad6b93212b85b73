"""The sampler against recorded reference outputs, a naive fp64 version, closed-form distributions and ties."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.noise import CounterNoise
from rollout.soft_token import SoftTokenParams, SoftTokens, mix_embeddings, partial_mixture, sample_soft_tokens

GOLDEN = Path(__file__).parent / "golden"
RECORDED = np.load(GOLDEN / "rollout.npz")
GUMBEL_CASES = ("train_cfg", "train_cfg_peaked", "min_p", "no_top_p", "mixed_modes")
CLIP = (-1.5, 3.0)


def recorded(case: str, field: str) -> torch.Tensor:
    return torch.from_numpy(RECORDED[f"{case}/{field}"])


def recorded_params(case: str, **overrides: object) -> SoftTokenParams:
    number = {name: RECORDED[f"{case}/{name}"].item() for name in ("temperature", "top_p", "top_k", "min_p")}
    return SoftTokenParams(
        **number,
        gumbel_temperature=recorded(case, "tau").item(),
        noise_scale=recorded(case, "noise_factor").item(),
        max_candidates=recorded(case, "max_topk").item(),
        **overrides,
    )


def over_vocabulary(ids: torch.Tensor, values: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return torch.zeros(len(ids), vocabulary).scatter_(1, ids.long(), values)


def rows(count: int, position: int = 0) -> CounterNoise:
    return CounterNoise(torch.arange(count), torch.full((count,), position))


@pytest.mark.parametrize("case", GUMBEL_CASES)
@pytest.mark.parametrize(("log_epsilon", "tolerance"), [(1e-6, 1e-6), (0.0, 5e-5)])
def test_recorded_gumbel_cases(case: str, log_epsilon: float, tolerance: float) -> None:
    logits, soft = recorded(case, "logits"), recorded(case, "soft_mask")
    params = recorded_params(case, noise_clip=CLIP, log_epsilon=log_epsilon)
    tokens = sample_soft_tokens(logits, params, recorded(case, "gumbel_noise_pre_sort_raw"))
    want = over_vocabulary(recorded(case, "out_topk_ids"), recorded(case, "out_topk_weights"), logits.shape[1])
    found = over_vocabulary(tokens.ids, tokens.weights, logits.shape[1])
    assert (found - want)[soft].abs().max() < tolerance
    assert torch.equal(tokens.ids[soft, 0], recorded(case, "out_topk_ids")[soft, 0])
    probabilities = recorded(case, "filtered_topk_probs_pre_noise")
    assert torch.equal(tokens.retained.sum(1)[soft], (probabilities > 0).sum(1)[soft])
    if log_epsilon:
        # The reference sorts by weight, which leaves values of underflowed weights in any order.
        values = recorded(case, "out_stored_gumbels").sort(dim=1, descending=True).values
        assert (tokens.perturbed - values)[soft].abs().max() < 2e-6


@pytest.mark.parametrize("case", ["gaussian", "dirichlet_top_p1"])
def test_recorded_gaussian_and_dirichlet_weights_are_rebuilt_from_stored_values(case: str) -> None:
    logits, stored = recorded(case, "logits"), recorded(case, "out_stored_gumbels")
    family = case.split("_", maxsplit=1)[0]
    params = recorded_params(case, noise=family, log_epsilon=1e-6)
    draws = stored  # filtered candidates have arbitrary ids there: any order of the draws has these weights
    if case == "dirichlet_top_p1":
        by_id = over_vocabulary(recorded(case, "out_topk_ids"), stored, logits.shape[1])
        draws = by_id.gather(1, torch.topk(logits, params.max_candidates).indices)
    tokens = sample_soft_tokens(logits, params, draws)
    assert (tokens.weights - recorded(case, "out_topk_weights")).abs().max() < 1e-6
    assert torch.equal(tokens.perturbed, stored)
    if case == "dirichlet_top_p1":
        assert torch.equal(tokens.ids, recorded(case, "out_topk_ids").to(torch.int32))


def naive(logits: np.ndarray, params: SoftTokenParams, draw: dict[int, float]) -> tuple[dict[int, float], int, float]:
    """One row in plain Python: {token: weight}, the emitted token, the threshold."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: params.top_k]
    order = [token for token in order if logits[token] > -math.inf]
    temperature = params.temperature
    if temperature == 0:
        return {order[0]: 1.0}, order[0], math.nan
    mass = {token: math.exp((logits[token] - logits[order[0]]) / temperature) for token in order}
    total, before, kept = sum(mass.values()), 0.0, []
    for token in order:
        if (before < params.top_p or params.top_p >= 1) and mass[token] >= params.min_p * mass[order[0]]:
            kept.append(token)
        before += mass[token] / total
    total = sum(mass[token] for token in kept)
    value = {token: math.log(mass[token] / total) + params.noise_scale * draw[token] for token in kept}
    top = max(value.values())
    threshold = -math.inf
    if params.censor_delta is not None:
        threshold = top + params.gumbel_temperature * math.log(params.censor_delta)
    raw = {t: math.exp((g - top) / params.gumbel_temperature) for t, g in value.items() if g >= threshold - 1e-6}
    total = sum(raw.values())
    return {t: w / total for t, w in raw.items()}, max(value, key=lambda t: value[t]), threshold


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(6, 40),
    settings_=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
            "top_k": st.integers(1, 6),
            "top_p": st.sampled_from([0.05, 0.5, 0.9, 1.0]),
            "min_p": st.sampled_from([0.0, 0.02, 0.5]),
            "gumbel_temperature": st.sampled_from([0.1, 0.5, 2.0]),
            "noise_scale": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
            "censor_delta": st.sampled_from([None, 1e-3, 0.2]),
        }
    ),
)
def test_equals_a_naive_version(seed: int, vocabulary: int, settings_: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, vocabulary, generator=generator)
    logits[1, ::3] = -math.inf
    params = SoftTokenParams(max_candidates=6, **settings_)
    source = rows(4, seed % 1000)
    tokens = sample_soft_tokens(logits, params, source)
    table = source(torch.arange(vocabulary).repeat(4, 1))
    for row in range(4):
        draw = {token: table[row, token].item() for token in range(vocabulary)}
        weights, emitted, threshold = naive(logits[row].double().numpy(), params, draw)
        found = over_vocabulary(tokens.ids, tokens.weights, vocabulary)[row]
        want = torch.zeros(vocabulary)
        for token, weight in weights.items():
            want[token] = weight
        assert (found - want).abs().max() < 2e-5
        assert tokens.ids[row, 0] == emitted
        if params.censor_delta is not None and params.temperature > 0:
            assert tokens.threshold is not None
            assert tokens.threshold[row].item() == pytest.approx(threshold, abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31), st.sampled_from(["gumbel", "gaussian", "dirichlet", "none"]), st.sampled_from([0.0, 1e-6])
)
def test_shape_of_every_output(seed: int, family: str, log_epsilon: float) -> None:
    logits = 4 * torch.randn(6, 30, generator=torch.Generator().manual_seed(seed))
    params = SoftTokenParams(noise=family, min_p=0.01, log_epsilon=log_epsilon)
    tokens = sample_soft_tokens(logits, params, rows(6, 3))
    assert tokens.ids.dtype == torch.int32
    assert {t.dtype for t in (tokens.perturbed, tokens.weights, tokens.logprobs, tokens.noise)} == {torch.float32}
    assert (tokens.weights.sum(1) - 1).abs().max() < 1e-5
    ordered = tokens.perturbed[:, 1:] <= tokens.perturbed[:, :-1]
    assert ordered.all()
    out = ~tokens.retained
    if log_epsilon == 0:
        assert (tokens.weights[out] == 0).all()
        assert (tokens.noise[out] == 0).all()
        assert torch.isneginf(tokens.perturbed[out]).all()
        assert torch.isneginf(tokens.logprobs[out]).all()
        mass = torch.exp(tokens.logprobs).sum(1)
        assert (mass - 1).abs().max() < 1e-5
    else:
        assert torch.allclose(tokens.logprobs[out], torch.tensor(math.log(1e-6)))
    if family == "gumbel":
        assert torch.equal(tokens.perturbed[tokens.retained], (tokens.logprobs + tokens.noise)[tokens.retained])


@pytest.mark.parametrize("scale", [0.7, torch.full((300,), 0.7)], ids=["one number", "per row"])
def test_the_perturbed_values_are_exact_but_for_one_rounding(scale: float | torch.Tensor) -> None:
    """So they do not hang on whether a compiler fuses the product with the sum."""
    params = SoftTokenParams(noise_scale=scale, censor_delta=1.0)
    tokens = sample_soft_tokens(torch.randn(300, 30, generator=torch.Generator().manual_seed(0)), params, rows(300))
    exact_scale = Fraction(torch.tensor(0.7).item())
    kept = tokens.retained
    pairs = zip(tokens.logprobs[kept].tolist(), tokens.noise[kept].tolist(), strict=True)
    exact = [float(Fraction(logprob) + exact_scale * Fraction(draw)) for logprob, draw in pairs]
    assert torch.equal(tokens.perturbed[kept], torch.tensor(exact, dtype=torch.float64).float())


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(16, 200)
    noise = rows(16)
    together = sample_soft_tokens(logits, SoftTokenParams(censor_delta=1e-3), noise)
    for row in (0, 7, 15):
        one = CounterNoise(noise.seed[row : row + 1], noise.position[row : row + 1])
        alone = sample_soft_tokens(logits[row : row + 1], SoftTokenParams(censor_delta=1e-3), one)
        for name in ("ids", "perturbed", "weights", "retained", "logprobs", "noise"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name


def test_settings_per_row_equal_settings_alone() -> None:
    logits = torch.randn(4, 60)
    values = {
        "temperature": [1.0, 0.0, 0.7, 1.3],
        "top_k": [5, 3, 1, 4],
        "top_p": [0.9, 0.8, 1.0, 0.5],
        "min_p": [0.0, 0.1, 0.0, 0.2],
        "gumbel_temperature": [0.1, 0.5, 1.0, 0.2],
        "noise_scale": [1.0, 1.0, 0.5, 2.0],
    }
    together = sample_soft_tokens(
        logits, SoftTokenParams(**{name: torch.tensor(column) for name, column in values.items()}), rows(4)
    )
    for row in range(4):
        params = SoftTokenParams(**{name: column[row] for name, column in values.items()})
        noise = CounterNoise(torch.tensor([row]), torch.tensor([0]))
        alone = sample_soft_tokens(logits[row : row + 1], params, noise)
        assert torch.equal(alone.ids[0], together.ids[row])
        assert torch.allclose(alone.weights[0], together.weights[row], atol=1e-5)
        assert torch.equal(alone.retained[0], together.retained[row])


@pytest.mark.parametrize("family", ["gumbel", "gaussian", "dirichlet", "none"])
def test_temperature_zero_is_greedy(family: str) -> None:
    logits = torch.randn(5, 40)
    tokens = sample_soft_tokens(logits, SoftTokenParams(temperature=0.0, noise=family), rows(5))
    assert torch.equal(tokens.ids[:, 0].long(), logits.argmax(1))
    assert torch.equal(tokens.weights, torch.eye(5)[:1].repeat(5, 1))
    assert (tokens.logprobs[:, 0] == 0).all()
    assert family in ("gaussian", "dirichlet") or not tokens.noise.any()
    assert (tokens.retained.sum(1) == 1).all()


def test_equal_logits_are_taken_in_the_order_of_their_ids() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, -0.0, 0.0, 1.0, -5.0]])
    for dtype in (torch.float32, torch.bfloat16):
        tokens = sample_soft_tokens(
            logits.to(dtype), SoftTokenParams(noise="none", top_p=1.0, top_k=5, max_candidates=6), rows(1)
        )
        assert tokens.ids[0].tolist() == [1, 2, 5, 0, 3, 4]
        assert tokens.retained[0].tolist() == [True] * 5 + [False]


def test_top_p_one_keeps_improbable_candidates() -> None:
    tokens = sample_soft_tokens(
        torch.tensor([[60.0, 0.0, -20.0]]), SoftTokenParams(top_k=3, top_p=1.0, max_candidates=3), rows(1)
    )
    assert tokens.retained.all()


def test_minus_infinity_never_survives() -> None:
    logits = torch.full((1, 10), -math.inf)
    logits[0, 3] = 0.0
    for log_epsilon in (0.0, 1e-6):
        tokens = sample_soft_tokens(logits, SoftTokenParams(top_p=1.0, log_epsilon=log_epsilon), rows(1))
        assert tokens.ids[0, 0] == 3
        assert tokens.weights[0].tolist() == [1, 0, 0, 0, 0]
        assert torch.isneginf(tokens.logprobs[0, 1:]).all()


def test_censored_candidates_are_those_below_the_threshold() -> None:
    logits = torch.randn(200, 30)
    plain = sample_soft_tokens(logits, SoftTokenParams(), rows(200))
    censored = sample_soft_tokens(logits, SoftTokenParams(censor_delta=1e-3), rows(200))
    assert censored.threshold is not None
    active = censored.perturbed >= censored.threshold[:, None]
    assert torch.equal(censored.weights > 0, active)
    assert (active != (plain.weights > 1e-3 * plain.weights[:, :1])).float().mean() < 0.01
    renormalised = torch.where(active, plain.weights, 0.0) / torch.where(active, plain.weights, 0.0).sum(
        1, keepdim=True
    )
    assert torch.allclose(censored.weights, renormalised, atol=1e-6)
    one_hot = sample_soft_tokens(logits, SoftTokenParams(censor_delta=1.0), rows(200))
    assert torch.equal(one_hot.weights, torch.eye(5)[:1].repeat(200, 1))


def frequencies(tokens: SoftTokens, vocabulary: int) -> np.ndarray:
    return np.bincount(tokens.ids[:, 0].numpy(), minlength=vocabulary)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_emitted_tokens_follow_p_without_clip(temperature: float) -> None:
    count, logits = 100_000, torch.tensor([2.0, 0.3, -0.5, 1.1, 0.0, -3.0])
    params = SoftTokenParams(temperature=temperature, top_p=1.0)
    tokens = sample_soft_tokens(logits.repeat(count, 1), params, rows(count, 17))
    p = torch.softmax(logits[:5] / temperature, 0).double()
    found = frequencies(tokens, 6)
    assert found[5] == 0
    assert scipy.stats.chisquare(found[:5], (p / p.sum() * count).numpy()).pvalue > 1e-3


def marginals() -> list[tuple[list[float], list[float]]]:
    cases = json.loads((GOLDEN / "montecarlo.json").read_text())["argmax_marginals_clamped_N2e6"]
    return [(case["p"], case["q"]) for case in cases]


@pytest.mark.parametrize(("p", "q"), marginals())
def test_clipped_noise_sharpens_as_the_reference_does(p: list[float], q: list[float]) -> None:
    count = 100_000
    logits = torch.log(torch.tensor(p)).repeat(count, 1)
    params = SoftTokenParams(top_p=1.0, noise_clip=CLIP, log_epsilon=1e-6)
    found = np.sort(frequencies(sample_soft_tokens(logits, params, rows(count, 3)), 5) / count)[::-1]
    want = np.sort(q)[::-1]
    assert np.all(np.abs(found - want) < 5 * np.sqrt(want * (1 - want) / count) + 4e-4), (found, want)
    plain = frequencies(sample_soft_tokens(logits, SoftTokenParams(top_p=1.0), rows(count, 3)), 5)
    assert scipy.stats.chisquare(plain, np.array(p) * count).pvalue > 1e-3


def test_gaussian_and_dirichlet_draws_have_their_distributions() -> None:
    count, p = 20_000, torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    logits = torch.log(p).repeat(count, 1)
    gaussian = sample_soft_tokens(logits, SoftTokenParams(noise="gaussian", noise_scale=2.0, top_p=1.0), rows(count))
    dirichlet = sample_soft_tokens(logits, SoftTokenParams(noise="dirichlet", top_p=1.0), rows(count))
    for token, probability in enumerate(p.tolist()):
        sample = gaussian.perturbed[gaussian.ids == token].double().numpy()
        assert scipy.stats.kstest((sample - probability) / 0.1, "norm").pvalue > 1e-4
        sample = dirichlet.perturbed[dirichlet.ids == token].double().numpy()
        sample = sample[sample > 1e-37]
        below = scipy.stats.gamma.cdf(1e-37, probability)
        uniform = (scipy.stats.gamma.cdf(sample, probability) - below) / (1 - below)
        assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-4


def test_nothing_depends_on_the_data_of_a_tensor() -> None:
    """Fake tensors have shapes only: reading a value, as a host synchronisation does, raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for family in ("gumbel", "gaussian", "dirichlet", "none"):
            params = SoftTokenParams(
                temperature=torch.ones(4),
                top_k=torch.full((4,), 3),
                noise=family,
                noise_clip=CLIP,
                censor_delta=1e-3 if family in ("gumbel", "none") else None,
            )
            noise = CounterNoise(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
            tokens = sample_soft_tokens(torch.randn(4, 50), params, noise)
            assert mix_embeddings(torch.randn(50, 8), tokens.ids, tokens.weights).shape == (4, 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_k", 6),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("gumbel_temperature", -0.1),
        ("noise", "uniform"),
        ("noise_clip", (3.0, -1.5)),
        ("censor_delta", 0.0),
        ("log_epsilon", -1.0),
        ("max_candidates", 0),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        SoftTokenParams(**{name: value})


@pytest.mark.parametrize("noise", ["gumbel", "gaussian", "dirichlet", "none"])
def test_gumbel_temperature_zero_leaves_the_heaviest_candidate_alone(noise: str) -> None:
    """Per row, whatever the noise: the same candidates are drawn, the mixture is replaced by its argmax."""
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * 0.1
    temperatures = torch.tensor([0.0, 0.5] * 4)
    mixed = sample_soft_tokens(logits, SoftTokenParams(noise=noise, gumbel_temperature=0.5), rows(8))  # type: ignore[arg-type]
    params = SoftTokenParams(noise=noise, gumbel_temperature=temperatures)  # type: ignore[arg-type]
    drawn = sample_soft_tokens(logits, params, rows(8))
    assert torch.equal(drawn.ids, mixed.ids) and torch.equal(drawn.perturbed, mixed.perturbed)
    assert torch.equal(drawn.weights[1::2], mixed.weights[1::2])
    assert torch.equal(drawn.weights[::2], torch.eye(5)[[0] * 4])


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="max_candidates"):
        sample_soft_tokens(torch.randn(2, 4), SoftTokenParams(), rows(2))
    with pytest.raises(ValueError, match="one draw per candidate"):
        sample_soft_tokens(torch.randn(2, 10), SoftTokenParams(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="censor_delta"):
        SoftTokenParams(noise="gaussian", censor_delta=0.1)


def test_mixture_rounds_once() -> None:
    table = recorded("embed", "table_bf16_as_f32").bfloat16()
    weights, ids = recorded("embed", "weights"), recorded("embed", "ids").int()
    mixed = mix_embeddings(table, ids, weights)
    exact = (table[ids.long()].double() * weights.double()[..., None]).sum(1)
    assert mixed.dtype == torch.bfloat16
    assert (mixed != exact.bfloat16()).float().mean() < 0.01  # fp32 sums cross a rounding boundary now and then
    # The reference rounds every product to bf16 first: up to one more ulp.
    assert (mixed.float() - recorded("embed", "out_eager_fp32_weights_bf16")).abs().max() < 0.02


def test_parts_of_a_sharded_vocabulary_add_up() -> None:
    table, ids, weights = torch.randn(64, 16), torch.randint(0, 64, (9, 5)), torch.rand(9, 5)
    parts = [partial_mixture(table[low : low + 16], ids, weights, low, low + 16) for low in range(0, 64, 16)]
    assert torch.allclose(sum(parts), mix_embeddings(table, ids, weights), atol=1e-5)


def test_one_graph_for_every_batch_size() -> None:
    """In a process of its own: engines on a CPU switch the compiler off, in this one too."""
    environment = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    script = f"from {__name__} import compile_for_every_batch_size; compile_for_every_batch_size()"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, timeout=120, check=True)


def compile_for_every_batch_size() -> None:
    """What fuses the sampler on a GPU: no graph break, no new graph per batch size, the same bits."""
    compiled = torch.compile(sample_soft_tokens, backend="eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for count in (2, 5, 9):
        logits, scale = torch.randn(count, 40), torch.ones(count)
        params = SoftTokenParams(temperature=scale, gumbel_temperature=scale / 10, censor_delta=1e-3)
        found, want = compiled(logits, params, rows(count)), sample_soft_tokens(logits, params, rows(count))
        for name in ("ids", "perturbed", "weights", "retained", "logprobs", "noise", "threshold"):
            assert torch.equal(getattr(found, name), getattr(want, name)), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
