"""Every option of a spec reaches the step: what a run says differs from that of the run without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from learner.optimizer import learning_rate
from learner.spec import LearnerError
from learner.trainer import Trainer, initialize_distributed, objective_settings
from tests.learner.handmade import learner_spec, make_group, without_machine

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_rank")]

Options = dict[str, Any]
Observe = Callable[[Options], dict[str, float]]

BASE: Options = {"mini_batches": 2, "epochs": 2, "learning_rate": 0.02}
"""Enough for ratios outside of every clip."""

KL: Options = {"kl_coefficient": 0.1}
GRADIENT_WITHIN: Options = {"mini_batches": 1, "epochs": 1, "learning_rate": 1e-3}
"""One optimiser step: the gradient before it is all that may differ."""


@pytest.fixture(scope="module")
def observe(tiny_model_dir: Path) -> Observe:
    """Metrics of one training step with some options; each set of them runs once."""
    seen: dict[str, dict[str, float]] = {}

    def run(options: Options) -> dict[str, float]:
        if str(options) not in seen:
            trainer = Trainer(learner_spec(tiny_model_dir, **options), rank=0)
            seen[str(options)] = without_machine(trainer.train([make_group(seed) for seed in range(2)], 0))
        return seen[str(options)]

    return run


def test_the_same_options_give_the_same_metrics(observe: Observe) -> None:
    """Without which no difference would mean anything."""
    assert observe(BASE) == observe(dict(reversed(BASE.items())))


@pytest.mark.parametrize(
    ("option", "value", "others"),
    [
        ("likelihood", "none", {}),
        ("likelihood", "argmax", {"policy_loss": "sapo"}),
        ("likelihood", "reference", {}),
        ("likelihood", "concrete", {"policy_loss": "gspo"}),
        ("likelihood", "gumbel", {}),
        ("likelihood", "dirichlet", {"noise": "dirichlet", "likelihood": "reference"}),
        ("noise", "dirichlet", {"likelihood": "reference"}),
        ("noise_scale", 0.5, {}),
        ("old_log_density", "behaviour", {}),
        ("advantage", "dr_grpo", {}),
        ("advantage", "rloo", {}),
        ("advantage", "reinforce", {}),
        ("advantage", "bnpo", {}),
        ("aggregation", "sequence_mean", {}),
        ("aggregation", "constant", {}),
        ("max_new_tokens", 64, {"aggregation": "constant"}),
        ("policy_loss", "gspo", {}),
        ("policy_loss", "cispo", {}),
        ("policy_loss", "sapo", {}),
        ("clip_low", 0.01, {}),
        ("clip_high", 0.01, {}),
        ("dual_clip", 1.01, {}),
        ("importance_cap", 1.5, {}),
        ("entropy_bonus", 0.1, {}),
        ("kl_coefficient", 0.1, {}),
        ("kl_estimator", "k1", KL),
        ("kl_estimator", "exact", KL),
        ("kl_estimator", "exact", KL | {"likelihood": "none"}),
        ("kl_estimator", "exact", KL | {"lora_rank": 2, "gradient_checkpointing": True}),
        ("kl_estimator", "exact_vocabulary", KL),
        ("temperature", 0.7, {}),
        ("answer_temperature", 0.7, {}),
        ("epochs", 1, {}),
        ("mini_batches", 1, {}),
        ("micro_batch_tokens", 40, {}),
        ("lora_rank", 2, {}),
        ("weight_decay", 0.5, {}),
        ("betas", (0.5, 0.6), {}),
        ("max_grad_norm", 0.01, {}),
        ("differentiate_soft_inputs", True, GRADIENT_WITHIN),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_every_option_changes_the_step(option: str, value: Any, others: Options, observe: Observe) -> None:
    without = BASE | others
    metrics = observe(without | {option: value})
    assert metrics["learner/skipped_steps"] == 0 and metrics["learner/grad_norm"] > 0
    assert metrics != observe(without)


def test_every_field_of_the_objective_comes_from_the_spec() -> None:
    other_values: Options = {
        "likelihood": "gumbel",
        "noise": "dirichlet",
        "noise_scale": 0.5,
        "old_log_density": "behaviour",
        "policy_loss": "gspo",
        "clip_low": 0.1,
        "clip_high": 0.3,
        "dual_clip": None,
        "importance_cap": 2.0,
        "entropy_bonus": 0.1,
        "kl_coefficient": 0.5,
        "kl_estimator": "k1",
    }
    usual = objective_settings(learner_spec(Path("unused")))
    assert other_values.keys() == {field.name for field in dataclasses.fields(usual)}
    for name, value in other_values.items():
        changed = objective_settings(learner_spec(Path("unused"), **{name: value}))
        assert value != getattr(usual, name), name
        assert changed == dataclasses.replace(usual, **{name: value}), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimiser_and_the_collectives_are_those_of_the_spec(stage: int, tiny_model_dir: Path) -> None:
    """In the optimiser that steps, under ZeRO inside of DeepSpeed's, and in every process group that anyone made."""
    spec = learner_spec(
        tiny_model_dir,
        zero_stage=stage,
        betas=(0.5, 0.6),
        warmup_steps=4,
        lr_schedule="linear",
        mini_batches=2,
        epochs=3,
    )
    trainer = Trainer(spec, rank=0)
    for step in (0, 6):
        trainer.steps = step
        metrics = trainer.train([make_group(seed) for seed in range(2)], step)
        assert metrics["learner/optimizer_steps"] == spec.epochs * spec.mini_batches
        groups = getattr(trainer.engine.optimizer, "optimizer", trainer.engine.optimizer).param_groups
        found = {(group["lr"], *group["betas"]) for group in groups}
        assert found == {(learning_rate(spec, step), 0.5, 0.6)}
    timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in distributed_c10d._world.pg_map}
    assert timeouts == {timedelta(seconds=spec.collective_timeout_s)}


def test_a_deepspeed_whose_collectives_have_no_deadline_is_refused(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("deepspeed.utils.groups._WORLD_GROUP")
    with pytest.raises(LearnerError, match=r"collective_timeout_s would not hold .* install deepspeed>="):
        initialize_distributed(learner_spec(tiny_model_dir))
