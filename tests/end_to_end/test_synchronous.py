"""`max_staleness: 0` is exact synchronous training: on recorded trajectories, the weights of a loop without queues.

The controller runs with its queues and random generation times; the learner is the real one, in this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.spec import PublishedWeights, ScoredGroup
from orchestration.dataset import PromptRow, PromptStream
from reward.verdict import Grade, Verdict
from rollout.request import GroupSummary, RolloutRequest
from rollout.weights import WeightManifest
from tests.learner.conftest import single_rank  # noqa: F401  (a fixture)
from tests.learner.handmade import learner_spec, make_group
from tests.orchestration import simulation
from tests.orchestration.simulation import Simulation, simulated_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_rank")]
STEPS, BATCH, GROUP = 4, 3, 4


class RecordedRollout(simulation.SimulatedRollout):
    """Takes a random time, then returns what was recorded for the group."""

    async def generate(self, room: Any, requests: Sequence[RolloutRequest]) -> tuple[Any, GroupSummary]:
        _, summary = await super().generate(room, requests)
        return recorded(summary.group_id).batch, summary


class RecordedVerifier(simulation.SimulatedVerifier):
    """The rewards that were recorded: every other response is right."""

    async def score(self, batch: Any, gold: Any, rule: str) -> list[Grade]:
        verdicts = [Verdict.CORRECT if i % 2 == 0 else Verdict.INCORRECT for i in range(batch.num_rows)]
        return [Grade(verdict, float(verdict is Verdict.CORRECT)) for verdict in verdicts]


class RealLearner:
    """The trainer of one rank behind the controller's protocol."""

    def __init__(self, model: Path) -> None:
        from learner.trainer import Trainer

        self.trainer = Trainer(learner_spec(model, mini_batches=3, kl_coefficient=0.01), rank=0)

    async def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        await asyncio.sleep(1.0)
        return self.trainer.train(groups, step)

    async def publish(self, version: int) -> PublishedWeights:
        return PublishedWeights(WeightManifest(version, (), ()), ())

    async def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)


def recorded(group_id: str) -> ScoredGroup:
    """The same group for the same id, always."""
    group = make_group(int(group_id.partition("@")[0].removeprefix("p")), size=GROUP)
    return replace(group, group_id=group_id)


def weights_of(learner: RealLearner) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in learner.trainer.weights()}


def test_bound_zero_equals_a_loop_without_queues(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(simulation, "SimulatedRollout", RecordedRollout)
    monkeypatch.setattr(simulation, "SimulatedVerifier", RecordedVerifier)
    queued = RealLearner(tiny_model_dir)
    monkeypatch.setattr(simulation, "SimulatedLearner", lambda timing: queued)
    config = simulated_config(
        tmp_path,
        steps=STEPS,
        pipeline__max_staleness=0,
        algorithm__prompts_per_step=BATCH,
        algorithm__group_size=GROUP,
        algorithm__mini_batches=3,
    )
    Simulation(config, prompts=50).run()

    plain = RealLearner(tiny_model_dir)
    rows = [PromptRow(f"p{i}", ({"role": "user", "content": "q"},), "1", "s", "math", i) for i in range(50)]
    stream = PromptStream(rows, seed=0)
    for step in range(STEPS):
        plain.trainer.train([recorded(next(stream).group_id) for _ in range(BATCH)], step)

    start = weights_of(RealLearner(tiny_model_dir))
    expected, found = weights_of(plain), weights_of(queued)
    assert any(not torch.equal(start[name], expected[name]) for name in expected), "the loop has trained nothing"
    assert all(torch.equal(found[name], expected[name]) for name in expected)
