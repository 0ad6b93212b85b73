"""Aggregation weights: golden numbers, and sums that do not depend on how the mini-batch is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from learner.aggregation import AGGREGATIONS, aggregate, sequence_weights

GOLDEN = Path(__file__).parent / "golden" / "algorithms.npz"


@pytest.mark.parametrize(
    ("key", "kind", "constant_length", "factor"),
    [
        ("token-mean", "token_mean", None, 1),
        ("seq-mean-token-mean", "sequence_mean", None, 1),
        ("seq-mean-token-sum", "constant", 1, 1),
        ("seq-mean-token-sum-norm", "constant", 7, 32),
    ],
)
def test_golden_numbers(key: str, kind: str, constant_length: int | None, factor: int) -> None:
    golden = np.load(GOLDEN)
    losses, mask = torch.from_numpy(golden["agg/loss_mat"]), torch.from_numpy(golden["agg/mask"])
    weights = sequence_weights(mask.sum(-1), kind=kind, constant_length=constant_length)  # type: ignore[arg-type]
    total = aggregate(losses[mask.bool()], weights[:, None].expand_as(losses)[mask.bool()])
    assert float(total) * factor == pytest.approx(float(golden[f"agg/{key}"]), rel=1e-6)


@pytest.mark.parametrize("kind", list(AGGREGATIONS))
def test_any_cut_of_the_mini_batch_adds_up_to_the_same_loss(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 11, 1, 0, 7])
    losses = [torch.randn(int(n), generator=generator, dtype=torch.float64) for n in lengths]
    weights = sequence_weights(lengths, kind=kind, constant_length=16)  # type: ignore[arg-type]
    definition = {
        "token_mean": torch.cat(losses).mean(),
        "sequence_mean": sum((loss.mean() for loss in losses if loss.numel()), torch.tensor(0.0)) / 5,
        "constant": torch.cat(losses).sum() / (5 * 16),
    }[kind]
    for cut in ([[0, 1, 2, 3, 4]], [[4, 2], [0], [3, 1]], [[i] for i in range(5)]):
        total = sum(
            aggregate(
                torch.cat([losses[i] for i in part]), torch.cat([weights[i].expand(len(losses[i])) for i in part])
            )
            for part in cut
        )
        torch.testing.assert_close(total, definition, atol=1e-12, rtol=1e-12)


def test_nothing_to_average() -> None:
    for kind in AGGREGATIONS:
        weights = sequence_weights(torch.tensor([0, 0]), kind=kind, constant_length=8)  # type: ignore[arg-type]
        assert torch.equal(weights, torch.zeros(2, dtype=torch.float64))


def test_constant_needs_a_length() -> None:
    with pytest.raises(ValueError, match="constant_length"):
        sequence_weights(torch.tensor([2]), kind="constant")
