"""The policy as it is loaded: what its passes keep for the gradient, and what it refuses."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learner.model import PolicyModel, load_policy
from learner.objective import ObjectiveSettings, objective, score_positions
from learner.packing import ReplayBatch
from learner.replay import plan_step, rank_batches
from learner.spec import LearnerError, LearnerSpec
from tests.learner.handmade import LAYERS, count_layer_runs, learner_spec, make_group

pytestmark = pytest.mark.slow


def batch_for(spec: LearnerSpec) -> ReplayBatch:
    (samples,) = plan_step([make_group(0)], spec, 64).mini_batches
    return rank_batches(samples, spec, 0)[0]


def forward(policy: PolicyModel, batch: ReplayBatch) -> tuple[Tensor, int]:
    """The loss of a pass, and the bytes that it holds for the gradient besides the parameters."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = policy(batch, partial(objective, batch=batch, settings=ObjectiveSettings()))
    return loss, sum(kept.values())


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_checkpointed_layers_are_run_again_and_keep_only_their_inputs(
    tiny_model_dir: Path, lora_rank: int | None
) -> None:
    """The gradient and the scores without one are those of the plain policy, to the bit."""
    kept, gradients, scores = [], [], []
    for checkpointing in (False, True):
        spec = learner_spec(tiny_model_dir, gradient_checkpointing=checkpointing, lora_rank=lora_rank)
        torch.manual_seed(0)
        policy = load_policy(spec)
        runs = count_layer_runs(policy)
        batch = batch_for(spec)
        loss, kept_bytes = forward(policy, batch)
        assert len(runs) == LAYERS
        loss.backward()
        assert len(runs) == LAYERS * (2 if checkpointing else 1)
        kept.append(kept_bytes)
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
        with torch.no_grad():
            scores.append(policy(batch, partial(score_positions, batch=batch)))
    assert kept[1] < kept[0] / 2, f"{kept[1]} bytes kept with checkpoints, {kept[0]} without"
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert torch.equal(scores[0].candidate_logits, scores[1].candidate_logits)
    assert torch.equal(scores[0].log_prob, scores[1].log_prob)


def test_dropout_never_acts(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Two passes of a policy agree; where the layers must believe that they train, the model is refused."""
    path = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}), encoding="utf-8")
    policy = load_policy(learner_spec(path))
    batch = batch_for(learner_spec(path))
    assert torch.equal(forward(policy, batch)[0], forward(policy, batch)[0])
    with pytest.raises(LearnerError, match=r"config.json has attention_dropout=0.5, .*set them to 0"):
        load_policy(learner_spec(path, gradient_checkpointing=True))


@pytest.mark.parametrize("rank", [2, 5])
def test_adapters_have_the_rank_of_the_spec(rank: int, tiny_model_dir: Path) -> None:
    policy = load_policy(learner_spec(tiny_model_dir, lora_rank=rank))
    shapes = [weight.shape for weight in policy.parameters() if weight.requires_grad]
    assert shapes and all(min(shape) == rank for shape in shapes)


@pytest.mark.parametrize(
    ("lora_rank", "asked_for", "differs"), [(None, False, False), (None, True, True), (2, True, False)]
)
def test_a_mixture_has_a_gradient_where_asked_for_and_none_under_adapters(
    lora_rank: int | None, asked_for: bool, differs: bool, tiny_model_dir: Path
) -> None:
    """Only the embedding table is behind a soft input, and adapters leave it as it is."""
    gradients = []
    for option in (False, asked_for):
        torch.manual_seed(0)
        spec = learner_spec(tiny_model_dir, lora_rank=lora_rank, differentiate_soft_inputs=option)
        policy = load_policy(spec)
        forward(policy, batch_for(spec))[0].backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    changed = {name for name in gradients[0] if not torch.equal(gradients[0][name], gradients[1][name])}
    assert changed == ({"language_model.model.embed_tokens.weight"} if differs else set())
