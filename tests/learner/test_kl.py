"""KL estimators: golden vectors, and agreement with the exact categorical divergence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from learner.kl import ESTIMATORS, candidate_entropy, candidate_kl, sampled_kl

GOLDEN = Path(__file__).parent / "golden" / "algorithms.npz"


@pytest.mark.parametrize(("key", "estimator"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")])
def test_golden_vectors(key: str, estimator: str) -> None:
    golden = np.load(GOLDEN)
    log_ratio = torch.from_numpy(golden["ppo/delta_logp"]).requires_grad_()
    values = sampled_kl(log_ratio, estimator=estimator)  # type: ignore[arg-type]
    values.sum().backward()
    torch.testing.assert_close(values, torch.from_numpy(golden[f"kl/{key}"]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(log_ratio.grad, torch.from_numpy(golden[f"kl/{key}_grad"]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_extreme_log_ratios_stay_finite(estimator: str) -> None:
    log_ratio = torch.tensor([-500.0, -30.0, 0.0, 30.0, 500.0], requires_grad=True)
    values = sampled_kl(log_ratio, estimator=estimator)  # type: ignore[arg-type]
    values.sum().backward()
    assert values.isfinite().all()
    assert log_ratio.grad.isfinite().all()
    if estimator != "k1":
        assert (values >= 0).all()


def test_k1_and_k3_estimate_the_exact_divergence() -> None:
    """The expectation over the policy's own categorical draws is the exact value."""
    p, q = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    exact = candidate_kl(p[None], q[None], torch.ones(1, 6, dtype=torch.bool))
    for estimator in ("k1", "k3"):
        expected = (p.exp() * sampled_kl(p - q, estimator=estimator)).sum()  # type: ignore[arg-type]
        torch.testing.assert_close(exact[0], expected)


def test_candidate_kl_and_entropy_on_the_retained() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 30, 5, dtype=torch.float64, generator=generator)
    retained = torch.rand(30, 5, generator=generator) > 0.4
    retained[:, 2] = True
    logits.requires_grad_()
    kl, entropy = candidate_kl(logits, reference, retained), candidate_entropy(logits, retained)
    for row in range(30):
        kept = retained[row]
        p, q = Categorical(logits=logits[row, kept]), Categorical(logits=reference[row, kept])
        torch.testing.assert_close(kl[row], kl_divergence(p, q))
        torch.testing.assert_close(entropy[row], p.entropy())
    (kl + entropy).sum().backward()
    assert logits.grad.isfinite().all()
    assert torch.equal(logits.grad[~retained], torch.zeros_like(logits.grad[~retained]))
    assert torch.equal(candidate_kl(logits, logits, retained), torch.zeros(30, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda z: (candidate_kl(z, reference, retained), candidate_entropy(z, retained)), logits
    )
