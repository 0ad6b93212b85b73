"""Learning rates, the guarded optimiser and the DeepSpeed options, without a process group."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from learner.optimizer import GuardedAdamW, build_optimizer, deepspeed_config, effective_zero_stage, learning_rate
from tests.learner.handmade import learner_spec

SPEC = dataclasses.replace(learner_spec(Path("unused")), learning_rate=1.0, warmup_steps=4, total_steps=20)


def rates(schedule: str) -> list[float]:
    spec = dataclasses.replace(SPEC, lr_schedule=schedule)
    return [learning_rate(spec, step) for step in range(25)]


def test_warm_up_reaches_the_rate_and_the_first_step_moves() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert rates(schedule)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates("constant")[4:] == [1.0] * 21


def test_decays_end_at_zero_at_the_last_step_and_stay_there() -> None:
    linear, cosine = rates("linear"), rates("cosine")
    assert linear[4] == cosine[4] == 1.0
    assert linear[12] == cosine[12] == pytest.approx(0.5)
    assert cosine[8] > linear[8]
    assert linear[19] == pytest.approx(1 / 16) and linear[20:] == [0.0] * 5
    assert cosine[20:] == pytest.approx([0.0] * 5)
    assert all(a >= b for a, b in itertools.pairwise(linear[4:]))


def test_vectors_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = build_optimizer(model, dataclasses.replace(SPEC, weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_guard_reports_the_norm_clips_and_skips() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = GuardedAdamW([weight], max_grad_norm=1.0, lr=0.1)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert optimizer._global_grad_norm == 5.0 and not optimizer.overflow
    assert weight.grad.norm().item() == pytest.approx(1.0)
    moved = weight.detach().clone()
    assert moved.abs().min() > 0
    weight.grad = torch.tensor([float("inf"), 0.0])
    optimizer.step()
    assert optimizer.overflow
    assert torch.equal(weight.detach(), moved)
    assert optimizer.state[weight]["step"].item() == 1


def test_stage_zero_becomes_one_where_master_weights_or_offload_need_it() -> None:
    assert effective_zero_stage(SPEC) == 0
    assert effective_zero_stage(dataclasses.replace(SPEC, dtype="bfloat16")) == 1
    assert effective_zero_stage(dataclasses.replace(SPEC, offload_optimizer=True)) == 1
    assert effective_zero_stage(dataclasses.replace(SPEC, dtype="bfloat16", zero_stage=3)) == 3
    config = deepspeed_config(dataclasses.replace(SPEC, dtype="bfloat16", offload_optimizer=True, zero_stage=2))
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_clipped_once_by_the_norm_of_the_spec(stage: int) -> None:
    spec = dataclasses.replace(SPEC, zero_stage=stage, max_grad_norm=3.0)  # type: ignore[arg-type]
    optimizer = build_optimizer(nn.Linear(2, 2), spec)
    limits = [deepspeed_config(spec)["gradient_clipping"], getattr(optimizer, "max_grad_norm", 0.0)]
    assert limits == ([3.0, 0.0] if stage else [0.0, 3.0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deepspeed_accepts_every_stage_type_and_offload(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own check of an engine's configuration: also of those that only start on a GPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    for stage, dtype, offload in itertools.product(range(4), ("float32", "bfloat16"), (False, True)):
        spec = dataclasses.replace(
            SPEC,
            device=device,  # type: ignore[arg-type]
            zero_stage=stage,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            offload_optimizer=offload,
        )
        engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
        nn.Module.__init__(engine)
        engine._config = DeepSpeedConfig(deepspeed_config(spec))
        engine.client_optimizer = build_optimizer(nn.Linear(2, 2), spec)
        engine.client_lr_scheduler = None
        engine.pipeline_parallelism = False
        engine._do_sanity_check()
        overlaps = device == "cuda" and effective_zero_stage(spec) == 3
        assert engine.zero_overlap_comm() == overlaps, (stage, dtype, offload)
