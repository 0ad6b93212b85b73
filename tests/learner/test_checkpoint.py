"""A learner state continues the same run, on the same number of ranks and on another one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import ray
import torch

from learner import checkpoint
from learner.checkpoint import FACTS
from learner.export import named_weights
from learner.spec import CheckpointNotWritten, LearnerError, ScoredGroup
from learner.trainer import Trainer
from tests.learner.handmade import learner_spec, make_group
from tests.learner.two_ranks import STEPS, Pair

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_rank")]


@pytest.fixture(scope="module")
def groups() -> list[ScoredGroup]:
    return [make_group(seed) for seed in range(4)]


def losses(metrics: list[dict[str, float]]) -> list[float]:
    return [step[name] for step in metrics for name in ("objective/policy_loss", "learner/grad_norm")]


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16")])
def test_another_number_of_ranks_continues(
    stage: int, dtype: str, tiny_model_dir: Path, tmp_path: Path, groups: list[ScoredGroup], pair: Pair
) -> None:
    """Two ranks save, one continues and saves, two continue: always the curve of the run that was never stopped."""
    from deepspeed.checkpoint import ds_to_universal

    spec = learner_spec(tiny_model_dir, mini_batches=2, micro_batch_tokens=40, zero_stage=stage, dtype=dtype)
    spec = dataclasses.replace(spec, weight_decay=5.0)  # only on matrices, also after a conversion
    tolerance = {"rel": 2e-3, "abs": 1e-5} if dtype == "float32" else {"rel": 0.1, "abs": 5e-3}
    both = dataclasses.replace(spec, world_size=2)
    first, second = tmp_path / "step_3" / "learner", tmp_path / "step_6" / "learner"
    first.mkdir(parents=True)
    second.mkdir(parents=True)

    pair.call("begin", both, pair.master)
    pair.call("run", groups)
    parts = pair.call("save", str(first))
    written = [name for part in parts for name in part.sizes]
    assert sorted(written) == sorted({name for name in names_below(first) if not name.endswith(".py")})
    assert all((first / name).stat().st_size == size for part in parts for name, size in part.sizes.items())
    uninterrupted = pair.call("run", groups)[0] + pair.call("run", groups)[0]

    saved = everything_below(first.parent)
    with pytest.MonkeyPatch.context() as patch:
        # Whatever is killed in the middle of a conversion must not have touched the committed checkpoint.
        convert = ds_to_universal.main
        patch.setattr(ds_to_universal, "main", lambda arguments: [convert(arguments), check_untouched(saved)])
        alone = Trainer(spec, rank=0, checkpoint=first)
    assert alone.steps == STEPS
    resumed = [alone.train(groups, step) for step in range(STEPS, 2 * STEPS)]
    alone.save(second)
    pair.call("begin", both, pair.master, str(second))
    resumed += pair.call("run", groups)[0]
    assert losses(resumed) == pytest.approx(losses(uninterrupted), **tolerance)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_6"]


def names_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def everything_below(checkpoint: Path) -> set[Path]:
    return set(checkpoint.rglob("*"))


def check_untouched(saved: set[Path]) -> None:
    (checkpoint,) = {path.parent for path in saved if path.name == "learner" and path.parent not in saved}
    assert everything_below(checkpoint) == saved


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_adapters_continue_on_one_rank(
    stage: int, tiny_model_dir: Path, tmp_path: Path, groups: list[ScoredGroup], pair: Pair
) -> None:
    spec = learner_spec(tiny_model_dir, zero_stage=stage, lora_rank=2, learning_rate=1e-2)
    pair.call("begin", dataclasses.replace(spec, world_size=2), pair.master)
    pair.call("run", groups)
    pair.call("save", str(tmp_path))
    uninterrupted = pair.call("run", groups)[0]
    alone = Trainer(spec, rank=0, checkpoint=tmp_path)
    resumed = [alone.train(groups, step) for step in range(STEPS, 2 * STEPS)]
    assert losses(resumed) == pytest.approx(losses(uninterrupted), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_refreshed_reference_is_part_of_the_state(
    stage: int, tiny_model_dir: Path, tmp_path: Path, groups: list[ScoredGroup]
) -> None:
    spec = learner_spec(tiny_model_dir, kl_coefficient=0.1, kl_refresh_every=2, zero_stage=stage)
    trainer = Trainer(spec, rank=0)
    for step in range(3):
        if step == 2:
            at_refresh = {name: weight.clone() for name, weight in trainer.weights()}
        trainer.train(groups, step)
    resumed_from = tmp_path / "state"
    resumed_from.mkdir()
    assert set(trainer.save(resumed_from)) >= {"reference.safetensors", "learner.json"}
    resumed = Trainer(spec, rank=0, checkpoint=resumed_from)
    for model in (trainer.reference, resumed.reference):
        kept = dict(named_weights(getattr(model, "module", model)))
        assert all(torch.equal(kept[name], weight) for name, weight in at_refresh.items())
    assert losses([resumed.train(groups, 3)]) == losses([trainer.train(groups, 3)])


@pytest.mark.parametrize(("stage", "full"), [(0, 0), (1, 1), (3, 0)])
def test_a_rank_that_cannot_write_costs_the_checkpoint_alone(
    stage: int, full: int, tiny_model_dir: Path, tmp_path: Path, groups: list[ScoredGroup], pair: Pair
) -> None:
    """Both ranks say so, none waits for the other, both train on, and the next checkpoint is whole."""
    spec = learner_spec(tiny_model_dir, zero_stage=stage, world_size=2, kl_coefficient=0.1, kl_refresh_every=2)
    pair.call("begin", spec, pair.master)
    pair.call("run", groups)
    ray.get(pair.ranks[full].limit_files.remote(4096), timeout=60)
    try:
        refused = pair.call("refusal", "save", tmp_path / "first")
    finally:
        ray.get(pair.ranks[full].limit_files.remote(-1), timeout=60)
    for error in refused:
        assert isinstance(error, CheckpointNotWritten)
        assert f"rank {full} cannot write to {tmp_path}/first: " in str(error)
    pair.call("save", str(tmp_path / "second"))
    uninterrupted = pair.call("run", groups)[0]
    pair.call("begin", spec, pair.master, str(tmp_path / "second"))
    assert losses(pair.call("run", groups)[0]) == losses(uninterrupted)


def test_a_conversion_that_outlasts_a_collective_names_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def barrier() -> None:
        raise RuntimeError("Timed out waiting 600000ms for recv operation to complete")

    monkeypatch.setattr(torch.distributed, "barrier", barrier)
    with (
        pytest.raises(
            LearnerError, match=r"learner\.collective_timeout_s, the driver learner\.startup_timeout_s: raise"
        ),
        checkpoint._converted(tmp_path / "step_000003" / "learner", rank=1),
    ):
        pass


def test_states_that_do_not_fit_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    spec = learner_spec(tiny_model_dir)
    with pytest.raises(LearnerError, match="no learner state that can be read"):
        Trainer(spec, rank=0, checkpoint=tmp_path)
    facts = {"steps": 3, "world_size": 1, "zero_stage": 2}
    (tmp_path / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(LearnerError, match="saved with ZeRO stage 2, this learner runs stage 0"):
        Trainer(spec, rank=0, checkpoint=tmp_path)
