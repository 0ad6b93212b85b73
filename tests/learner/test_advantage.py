"""Advantages: golden vectors, hand-computed groups, order and equal groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.advantage import ESTIMATORS, group_advantage
from learner.spec import ReplayError

GOLDEN = Path(__file__).parent / "golden" / "algorithms.npz"


@pytest.mark.parametrize(("estimator", "key"), [("grpo", "adv"), ("dr_grpo", "adv_nostd")])
def test_golden_vectors(estimator: str, key: str) -> None:
    golden = np.load(GOLDEN)
    rewards = torch.from_numpy(golden["grpo/token_rewards"]).sum(-1)
    groups = torch.from_numpy(golden["grpo/group"])
    advantages = group_advantage(rewards, groups, estimator=estimator)  # type: ignore[arg-type]
    expected = torch.from_numpy(golden[f"grpo/{key}"])
    mask = torch.from_numpy(golden["grpo/mask"])
    torch.testing.assert_close(advantages[:, None] * mask, expected, atol=1e-6, rtol=0)


def test_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    groups = torch.tensor([7, 7, 7, 7, 3, 3])
    rloo = group_advantage(rewards, groups, estimator="rloo")
    torch.testing.assert_close(rloo, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3, 0.0, 0.0]))
    reinforce = group_advantage(rewards, groups, estimator="reinforce")
    torch.testing.assert_close(reinforce, (rewards - 0.5) / (rewards.std() + 1e-6))


def test_bnpo_is_grpo_up_to_a_constant_for_a_flat_success_rate() -> None:
    """Success rates with the moments of Beta(3/2, 3/2) give alpha = beta = 3/2: the standard deviation's shape."""
    rates = torch.tensor([2, 6], dtype=torch.float64) / 8  # variance 1/16, mean 1/2: a = b = 3/2
    rewards = torch.cat([(torch.arange(8) < int(rate * 8)).double() for rate in rates])
    groups = torch.arange(2).repeat_interleave(8)
    bnpo = group_advantage(rewards, groups, estimator="bnpo")
    alpha = beta = 1 + 1.5 / 3
    density = torch.distributions.Beta(alpha, beta).log_prob(rates).exp().repeat_interleave(8)
    torch.testing.assert_close(bnpo, (rewards - rates.repeat_interleave(8)) / density.double())


@pytest.mark.parametrize(
    "rewards", [[1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.1, 0.7, 0.9]], ids=str
)
def test_bnpo_of_groups_with_one_mean_only_subtracts_it(rewards: list[float]) -> None:
    """Also where the mean of the means is rounded, or the sums of the groups are, so that they seem to vary."""
    members = torch.tensor(rewards, dtype=torch.float64)
    values = torch.cat([members if number % 2 else members.flip(0) for number in range(6)])
    groups = torch.arange(6).repeat_interleave(len(rewards))
    bnpo = group_advantage(values, groups, estimator="bnpo")
    torch.testing.assert_close(bnpo, group_advantage(values, groups, estimator="dr_grpo"))


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_advantages_are_on_the_device_of_the_rewards(estimator: str) -> None:
    """Whatever torch's default is: nothing on the way is made elsewhere."""
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    with torch.device("meta"):
        advantages = group_advantage(rewards, groups, estimator=estimator)  # type: ignore[arg-type]
    assert torch.equal(advantages, group_advantage(rewards, groups, estimator=estimator))  # type: ignore[arg-type]


@pytest.mark.parametrize("rewards", [[1.1, 0.0], [1.0, -0.1]])
def test_bnpo_wants_success_rates(rewards: list[float]) -> None:
    """Others fail the batch, not the ranks: `math + 0.1*format` is above 1 in some batches only."""
    with pytest.raises(ReplayError, match=rf"bnpo .* {min(rewards):g} to {max(rewards):g}: let the weights") as refused:
        group_advantage(torch.tensor(rewards), torch.tensor([0, 0]), estimator="bnpo")
    assert refused.value.outcome == "replay"


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "bnpo"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_give_exactly_zero(estimator: str, reward: float) -> None:
    """Also where their mean is not exact: ten times 0.1 in fp64."""
    for size, dtype in ((7, torch.float32), (10, torch.float64)):
        rewards = torch.tensor([reward] * size + [1.0, 0.0], dtype=dtype)
        groups = torch.tensor([5] * size + [6] * 2)
        advantages = group_advantage(rewards, groups, estimator=estimator)  # type: ignore[arg-type]
        assert torch.equal(advantages[:size], torch.zeros(size, dtype=dtype))
        assert (advantages[size:] != 0).all()


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_one_response_or_none(estimator: str) -> None:
    alone = group_advantage(torch.tensor([1.0]), torch.tensor([4]), estimator=estimator)  # type: ignore[arg-type]
    assert torch.equal(alone, torch.zeros(1))
    nothing = group_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.int64), estimator=estimator)  # type: ignore[arg-type]
    assert nothing.shape == (0,)


@settings(max_examples=60, deadline=None)
@given(
    rewards=st.lists(st.integers(0, 4).map(lambda value: value / 4), min_size=1, max_size=24),
    number=st.integers(1, 5),
    seed=st.integers(0, 1000),
    estimator=st.sampled_from(list(ESTIMATORS)),
)
def test_order_and_group_names_do_not_matter(rewards: list[float], number: int, seed: int, estimator: str) -> None:
    values = torch.tensor(rewards)
    groups = torch.arange(len(rewards)) % number
    permutation = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    plain = group_advantage(values, groups, estimator=estimator)  # type: ignore[arg-type]
    moved = group_advantage(values[permutation], (groups * 17 - 3)[permutation], estimator=estimator)  # type: ignore[arg-type]
    assert plain.isfinite().all()
    torch.testing.assert_close(moved, plain[permutation], atol=1e-6, rtol=1e-6)
    if estimator != "reinforce":
        sums = torch.zeros(number).index_add(0, groups, plain)
        torch.testing.assert_close(sums, torch.zeros(number), atol=1e-4, rtol=0)
