"""The learner on a CUDA device: DeepSpeed takes its settings at every ZeRO stage, and all make the same steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.trainer import Trainer
from tests.learner.conftest import one_rank
from tests.learner.handmade import learner_spec, make_group

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Relative: sums are made in another order at every stage."""


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    with one_rank(DEVICE):
        yield


def steps_of(trainer: Trainer, steps: range) -> list[float]:
    groups = [make_group(seed) for seed in range(4)]
    names = ("objective/policy_loss", "learner/grad_norm")
    return [metrics[name] for metrics in (trainer.train(groups, step) for step in steps) for name in names]


def spec_of(model: Path, **changes: Any) -> Any:
    return learner_spec(model, device=DEVICE, mini_batches=2, learning_rate=1e-4, **changes)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_all_stages_make_the_same_steps(dtype: str, tiny_model_dir: Path) -> None:
    expected: list[float] = []
    for stage, offload, checkpointing in itertools.product(range(4), (False, True), (False, True)):
        if stage == 0 and offload:
            continue
        trainer = Trainer(
            spec_of(
                tiny_model_dir,
                dtype=dtype,
                zero_stage=stage,
                offload_optimizer=offload,
                gradient_checkpointing=checkpointing,
            ),
            rank=0,
        )
        assert next(trainer.policy.parameters()).device.type == DEVICE
        found = steps_of(trainer, range(3))
        expected = expected or found
        assert found == pytest.approx(expected, rel=TOLERANCE[dtype], abs=1e-4), (stage, offload, checkpointing)
        weights = list(trainer.weights())
        assert len(weights) > 10 and all(weight.isfinite().all() for _, weight in weights)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_goes_on_where_it_was_saved(stage: int, tiny_model_dir: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny_model_dir, dtype="bfloat16", zero_stage=stage)
    trainer = Trainer(spec, rank=0)
    steps_of(trainer, range(1))
    trainer.save(tmp_path)
    uninterrupted = steps_of(trainer, range(1, 3))
    resumed = Trainer(spec, rank=0, checkpoint=tmp_path)
    assert resumed.steps == 1
    assert steps_of(resumed, range(1, 3)) == pytest.approx(uninterrupted, rel=TOLERANCE["bfloat16"], abs=1e-4)
