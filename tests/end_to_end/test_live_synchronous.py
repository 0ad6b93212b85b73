"""`max_staleness: 0` through the live engine: ids, noise and (within `WEIGHTS_ATOL`) weights of a loop without queues.

Both train the same model on what the same rollout actor answers. The loop generates one group after another, trains,
loads the new weights; the controller has its queues, and its groups decode together. Rollout pool, engine, weight path
and learner are the real ones; the learner is in this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from learner.spec import PublishedWeights, ScoredGroup
from orchestration.controller import Controller
from orchestration.dataset import PromptRow, PromptStream, Visit
from orchestration.parts import Parts
from orchestration.rollout_pool import RolloutPool
from orchestration.run_state import RunDirectory, RunState
from orchestration.step_metrics import StepMetrics
from reward.verdict import Grade, Verdict
from rollout.actor import RolloutActor
from rollout.engine_spec import engine_environment
from rollout.request import RolloutRequest, sample_seed
from rollout.trajectory import Trajectory, unpack
from rollout.transport import FullSender, Link
from tests.learner.conftest import single_rank  # noqa: F401  (a fixture)
from tests.learner.handmade import learner_spec
from tests.orchestration.simulation import simulated_config
from tests.rollout.conftest import MAX_CANDIDATES, base_spec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_rank")]
STEPS, BATCH, GROUP = 3, 3, 4
DEADLINE_S = 120.0
SECOND_START = 10
"""Version under which the actor serves the initial weights again."""
WEIGHTS_ATOL = 1e-5
"""The last bits of an engine's sums may depend on what else it decodes; a training step moves weights by 1e-3."""


class LocalLearner:
    """The trainer of one rank in this process, behind the controller's protocol; parts go through the object store."""

    def __init__(self, model: Path) -> None:
        from learner.trainer import Trainer

        self.trainer = Trainer(learner_spec(model, mini_batches=3, max_candidates=MAX_CANDIDATES), rank=0)
        self._sender = FullSender(max_shard_bytes=32 * 2**10)

    async def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        return self.trainer.train([replace(group, batch=ray.get(group.batch)) for group in groups], step)

    async def publish(self, version: int) -> PublishedWeights:
        *parts, link = (
            item if isinstance(item, Link) else ray.put(item)
            for item in self._sender.send(version, self.trainer.weights())
        )
        assert isinstance(link, Link) and link.num_parts == len(parts) > 1
        return PublishedWeights(link.manifest, tuple(parts), (link,))

    async def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.clone() for name, weight in self.trainer.weights()}


class ParityVerifier:
    """An answer is right where the sum of its ids is odd: every group has both kinds."""

    async def score(self, batch: Any, gold: Any, rule: str) -> list[Grade]:
        return [Grade(Verdict.CORRECT if reward else Verdict.INCORRECT, reward) for reward in parities(batch)]

    def raise_if_broken(self) -> None:
        return


def parities(batch: Any) -> list[float]:
    return [float(trajectory.response_ids.sum() % 2) for trajectory in unpack(ray.get(batch))]


def prompt_ids(visit: Visit) -> tuple[int, ...]:
    return (1, *(5 + (7 * visit.row.line + 3 * position) % 59 for position in range(8)), 3)


def prompts() -> PromptStream:
    rows = [PromptRow(f"p{i}", ({"role": "user", "content": "q"},), "1", "s", "math", i) for i in range(20)]
    return PromptStream(rows, seed=0)


@asynccontextmanager
async def started_pool(model: Path) -> AsyncIterator[RolloutPool]:
    spec = base_spec(model, max_new_tokens=24, thinking_budget=12)
    options = {"num_cpus": 1, "max_concurrency": 100, "runtime_env": {"env_vars": engine_environment(spec)}}
    pool = RolloutPool(
        lambda index: ray.remote(RolloutActor).options(**options).remote(spec),
        1,
        request_timeout_s=DEADLINE_S,
        sync_timeout_s=DEADLINE_S,
        max_in_flight=64,
        startup_timeout_s=DEADLINE_S,
        hang_timeout_s=DEADLINE_S,
        restarts=0,
    )
    try:
        await pool.start()
        yield pool
    finally:
        pool.kill()


Answers = dict[str, list[Trajectory]]
"""By group id."""


async def plain_loop(pool: RolloutPool, learner: LocalLearner) -> list[Answers]:
    """Generate, train, load; what was generated at every step."""
    stream, steps = prompts(), []
    for step in range(STEPS):
        groups, answers = [], {}
        for _ in range(BATCH):
            visit = next(stream)
            batch, _ = await pool.respond(requests(visit))
            groups.append(ScoredGroup(visit.group_id, batch, tuple(parities(batch)), (True,) * GROUP))
            answers[visit.group_id] = unpack(ray.get(batch))
        await learner.train(groups, step)
        await pool.publish(await learner.publish(step + 1))
        await pool.synchronised()
        steps.append(answers)
    return steps


def requests(visit: Visit) -> list[RolloutRequest]:
    name, group_id, ids = visit.row.prompt_id, visit.group_id, prompt_ids(visit)
    return [
        RolloutRequest(f"{group_id}/{i}", group_id, name, i, sample_seed(0, name, visit.visit, i), ids)
        for i in range(GROUP)
    ]


async def controlled(pool: RolloutPool, learner: LocalLearner, place: Path) -> list[Answers]:
    """The same steps by the controller, from the same weights under another version number."""
    algorithm = {"algorithm__prompts_per_step": BATCH, "algorithm__group_size": GROUP, "algorithm__mini_batches": 3}
    config = simulated_config(place, steps=STEPS, pipeline__max_staleness=0, **algorithm)
    directory, stream, steps = RunDirectory(config.run_dir), prompts(), []
    directory.create(config, resume=False)

    async def after_step(step: int, version: int, metrics: StepMetrics) -> None:
        assert (step, version) == (len(steps) + 1, SECOND_START + len(steps) + 1)
        steps.append({group.visit.group_id: unpack(ray.get(group.batch)) for group in metrics.groups})

    parts = Parts(stream, prompt_ids, pool, ParityVerifier(), learner, directory, after_step)  # type: ignore[arg-type]
    await pool.publish(await learner.publish(SECOND_START))
    await pool.synchronised()
    await Controller(config, parts, RunState(0, SECOND_START, stream.state())).run()
    return steps


def check_same(plain: Trajectory, queued: Trajectory) -> None:
    """Ids and kinds, and every bit of the noise."""
    for name in ("response_ids", "kinds", "candidate_ids"):
        np.testing.assert_array_equal(getattr(queued, name), getattr(plain, name), err_msg=name)
    np.testing.assert_array_equal(queued.noise.view(np.int32), plain.noise.view(np.int32))


def test_bound_zero_through_the_live_engine(ray_local: None, tiny_model_dir: Path, tmp_path: Path) -> None:
    async def both() -> tuple[list[Answers], list[Answers]]:
        async with asyncio.timeout(DEADLINE_S), started_pool(tiny_model_dir) as pool:
            return await plain_loop(pool, plain), await controlled(pool, queued, tmp_path)

    plain, queued = LocalLearner(tiny_model_dir), LocalLearner(tiny_model_dir)
    initial = plain.weights()
    expected, found = asyncio.run(both())

    assert len(found) == len(expected) == STEPS
    for step, (plain_answers, queued_answers) in enumerate(zip(expected, found, strict=True)):
        assert queued_answers.keys() == plain_answers.keys(), f"step {step + 1} trained other groups"
        for group_id, trajectories in plain_answers.items():
            for one, other in zip(trajectories, queued_answers[group_id], strict=True):
                check_same(one, other)
                assert set(one.versions) == {step} and set(other.versions) == {SECOND_START + step}
    distances = {name: float((queued.weights()[name] - weight).abs().max()) for name, weight in plain.weights().items()}
    assert max(distances.values()) < WEIGHTS_ATOL, distances
    moved = max(float((plain.weights()[name] - weight).abs().max()) for name, weight in initial.items())
    assert moved > 100 * WEIGHTS_ATOL, "the loop has trained too little to tell two policies apart"
