"""Policy losses: golden vectors, definitions, overflow, masks; the importance weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from learner.policy_loss import POLICY_LOSSES, importance_weight, policy_loss, sequence_log_ratio

GOLDEN = Path(__file__).parent / "golden" / "algorithms.npz"


@pytest.mark.parametrize("sign", ["+1", "-1"])
def test_ppo_golden_vectors(sign: str) -> None:
    golden = np.load(GOLDEN)
    log_ratio = torch.from_numpy(golden["ppo/delta_logp"]).requires_grad_()
    ones = torch.ones_like(log_ratio)
    loss = policy_loss(log_ratio, float(sign) * ones, ones, kind="ppo", clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.from_numpy(golden[f"ppo/loss_adv{sign}"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(log_ratio.grad, torch.from_numpy(golden[f"ppo/grad_adv{sign}"]), atol=1e-6, rtol=0)


def test_ppo_bounds_are_separate() -> None:
    log_ratio = torch.tensor([1.25, 1.35, 0.75, 0.65]).log().requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = policy_loss(log_ratio, advantage, torch.ones(4), kind="ppo", clip_low=0.3, clip_high=0.28)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([-1.25, -1.28, 0.75, 0.7]))
    assert (log_ratio.grad != 0).tolist() == [True, False, True, False]


def test_dual_clip_bounds_the_loss_of_bad_responses() -> None:
    log_ratio = torch.tensor([3.0, 3.0])
    advantage = torch.tensor([-1.0, 1.0])
    bounded = policy_loss(log_ratio, advantage, torch.ones(2), kind="ppo", dual_clip=3.0)
    free = policy_loss(log_ratio, advantage, torch.ones(2), kind="ppo", dual_clip=None)
    torch.testing.assert_close(bounded, torch.tensor([3.0, -1.2]))
    torch.testing.assert_close(free, torch.tensor([float(np.exp(3.0)), -1.2]))


@pytest.mark.parametrize("kind", list(POLICY_LOSSES))
def test_on_policy_gradient_is_minus_the_advantage(kind: str) -> None:
    """Every objective is the plain policy gradient at ratio 1 (gspo through the mean over its sequence)."""
    log_ratio = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([0.7, 0.7, -1.3, -1.3], dtype=torch.float64)
    options = {"sequence_ids": torch.tensor([0, 0, 1, 1])} if kind == "gspo" else {}
    loss = policy_loss(log_ratio, advantage, torch.ones(4), kind=kind, **options)  # type: ignore[arg-type]
    loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, -advantage)


def test_sapo_gate() -> None:
    log_ratio = torch.linspace(-1, 1, 21, dtype=torch.float64, requires_grad=True)
    loss = policy_loss(log_ratio, torch.ones(21), torch.ones(21), kind="sapo", tau_positive=2.0)
    loss.sum().backward()
    ratio = log_ratio.detach().exp()
    gate = torch.sigmoid(2.0 * (ratio - 1))
    torch.testing.assert_close(loss, -4 / 2.0 * gate)
    torch.testing.assert_close(log_ratio.grad, -4 * gate * (1 - gate) * ratio)


def test_cispo_keeps_the_gradient_of_clipped_positions() -> None:
    log_ratio = torch.tensor([0.0, 1.0, -2.0], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0])
    policy_loss(log_ratio, advantage, torch.ones(3), kind="cispo", clip_high=0.2).sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([-1.0, -1.2, float(np.exp(-2.0))]))
    log_ratio.grad = None
    policy_loss(log_ratio, advantage, torch.ones(3), kind="cispo", clip_low=0.2, clip_high=0.2).sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([-1.0, -1.2, 0.8]))


def test_gspo_uses_one_ratio_per_sequence() -> None:
    log_ratio = torch.tensor([[0.1, 0.3, 9.0], [-0.2, 0.0, -0.1]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantage = torch.tensor([[1.0] * 3, [-1.0] * 3])
    clip = {"clip_low": 0.05, "clip_high": 0.05}
    matrix = policy_loss(log_ratio, advantage, mask, kind="gspo", **clip)
    expected = torch.tensor([[-1.05, -1.05, 0.0], [0.95, 0.95, 0.95]])
    torch.testing.assert_close(matrix, expected)
    ids = torch.tensor([4, 4, 4, 2, 2, 2])
    flat = policy_loss(log_ratio.flatten(), advantage.flatten(), mask.flatten(), kind="gspo", sequence_ids=ids, **clip)
    torch.testing.assert_close(flat, expected.flatten())
    means = sequence_log_ratio(torch.where(mask, log_ratio, 0.0), mask)
    torch.testing.assert_close(means[:, 0], torch.tensor([0.2, -0.1]))


@pytest.mark.parametrize("kind", list(POLICY_LOSSES))
def test_extreme_log_ratios_stay_finite(kind: str) -> None:
    log_ratio = torch.tensor([-1e30, -90.0, 0.0, 90.0, 1e30], requires_grad=True)
    for sign in (1.0, -1.0):
        loss = policy_loss(log_ratio, torch.full((5,), sign), torch.ones(5), kind=kind)  # type: ignore[arg-type]
        loss.sum().backward()
        assert loss.isfinite().all()
        assert log_ratio.grad.isfinite().all()


@pytest.mark.parametrize("kind", list(POLICY_LOSSES))
def test_masked_positions_contribute_nothing(kind: str) -> None:
    log_ratio = torch.tensor([0.1, torch.nan, torch.inf], requires_grad=True)
    mask = torch.tensor([True, False, False])
    loss = policy_loss(log_ratio, torch.tensor([1.0, torch.nan, 1.0]), mask, kind=kind)  # type: ignore[arg-type]
    loss.sum().backward()
    alone = policy_loss(log_ratio[:1], torch.ones(1), torch.ones(1), kind=kind)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, torch.tensor([float(alone.detach()), 0.0, 0.0]))
    assert torch.equal(log_ratio.grad[1:], torch.zeros(2))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError):
        policy_loss(torch.zeros(1), torch.ones(1), torch.ones(1), kind="ppo", clip=0.2)


def test_importance_weight_is_truncated_and_constant() -> None:
    learner = torch.tensor([0.0, 1.0, -1.0, 200.0], requires_grad=True)
    weight = importance_weight(learner, torch.zeros(4), cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 2.0, float(np.exp(-1.0)), 2.0]))
    assert not weight.requires_grad
