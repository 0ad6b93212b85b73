"""The learner group on real Ray actors: two ranks equal one, publishing, failures with a name."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from learner.group import LearnerError, LearnerGroup, LearnerSpec, ReplayError
from learner.trainer import Trainer
from rollout.transport import make_receiver
from rollout.weights import iterate_weights
from tests.conftest import ROOT
from tests.learner.handmade import learner_spec, make_group, without_machine

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]

RANK_OPTIONS = {"num_cpus": 1}


def in_store(groups: list[Any]) -> list[Any]:
    """Groups as the driver has them: batches are references."""
    return [dataclasses.replace(group, batch=ray.put(group.batch)) for group in groups]


async def published_weights(group: LearnerGroup, version: int) -> dict[str, torch.Tensor]:
    published = await group.publish(version)
    assert published.manifest.version == version
    receiver = make_receiver(group.spec.transport)
    parts = ray.get(list(published.shards), timeout=30)
    shards = receiver.receive(published.links, lambda first, count: parts[first : first + count])
    return {name: tensor.clone() for name, tensor in iterate_weights(published.manifest, shards)}


@pytest.mark.usefixtures("single_rank")
def test_two_ranks_train_publish_and_fail_by_name(tiny_model_dir: Path, tmp_path: Path) -> None:
    spec = learner_spec(tiny_model_dir, mini_batches=2, kl_coefficient=0.01, micro_batch_tokens=40, shard_bytes=8192)
    spec = dataclasses.replace(spec, transport="delta")
    groups = [make_group(seed) for seed in range(4)]
    alone = Trainer(spec, rank=0)
    expected = [alone.train(groups, version) for version in range(3)]
    weights = {name: weight.clone() for name, weight in alone.weights()}

    async def scenario() -> None:
        pair = LearnerGroup(dataclasses.replace(spec, world_size=2), RANK_OPTIONS)
        facts = await pair.start(None)
        assert len(facts["pids"]) == 2 and facts["steps"] == 0
        try:
            found = [await pair.train(in_store(groups), version) for version in range(3)]
            check_published(await published_weights(pair, 3), weights)
            check_published(await published_weights(pair, 4), weights)
            compare(expected, found)
            judged = [metrics.get("mismatch/alarm") for metrics in found]
            assert judged == [1.0, None, None], "the model is version 0, what came of it was not published"
            with pytest.raises(ReplayError, match="none of the 1 groups"):
                await pair.train(in_store([dataclasses.replace(groups[0], keep=(False,) * 4)]), 3)
            assert pair.alive
            await pair.save(tmp_path)
            after_save = await pair.train(in_store(groups), 3)
            await a_dead_rank_is_named(pair, facts["pids"][1], in_store(groups))
            resumed = await pair.start(tmp_path)
            assert resumed["steps"] == 3 and resumed["generation"] == 2
            assert await pair.train(in_store(groups), 3) == approx_metrics(after_save)
        finally:
            pair.kill()

    asyncio.run(scenario())


def check_published(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-6, msg=name)


def compare(expected: list[dict[str, float]], found: list[dict[str, float]]) -> None:
    for one, two in zip(expected, found, strict=True):
        assert set(two) - set(one) - {"mismatch/alarm"} == {"objective/collapse_warning"}
        assert two == approx_metrics(one)


def approx_metrics(metrics: dict[str, float]) -> Any:
    """Everything but times, memory and how the work was cut."""

    class Same:
        def __eq__(self, other: object) -> bool:
            assert isinstance(other, dict)
            for name, value in without_machine(metrics).items():
                if name == "learner/passes":
                    continue
                assert other[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
            return True

    return Same()


async def a_dead_rank_is_named(group: LearnerGroup, pid: int, groups: list[Any]) -> None:
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(LearnerError, match=r"generation 1, phase fetch: .*rank 1 died"):
        await group.train(groups, 4)
    assert time.monotonic() - started < 20
    assert not group.alive
    with pytest.raises(LearnerError, match="not running"):
        await group.train(groups, 4)


def test_publishing_gives_exactly_the_models_tensors(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bit equality with the checkpoint's own tensors, Hugging Face names, no tied copy; a slow rank is named.

    The step that follows has tokens of that version which no such weights gave; the one after it has other weights.
    """
    from safetensors.torch import load_file

    async def scenario() -> None:
        group = LearnerGroup(learner_spec(tiny_model_dir, shard_bytes=4096), RANK_OPTIONS)
        facts = await group.start(None)
        try:
            found = await published_weights(group, 0)
            expected = load_file(tiny_model_dir / "model.safetensors")
            assert set(found) == set(expected) and "lm_head.weight" not in found
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            steps = [await group.train(in_store([make_group(0, version=0)]), step) for step in (0, 1)]
            assert [metrics.get("mismatch/alarm") for metrics in steps] == [1.0, None]
            assert caplog.text.count("engine and learner disagree about tokens of the same weights") == 1
            os.kill(facts["pids"][0], signal.SIGSTOP)
            group.spec = dataclasses.replace(group.spec, sync_timeout_s=1.0)
            with pytest.raises(LearnerError, match=r"phase publish: rank 0 not done after 1 s"):
                await group.publish(0)
        finally:
            group.kill()

    asyncio.run(scenario())


def test_rising_kl_and_entropy_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """Two constant phases, the second one with more of both: one warning, in the log and in the metrics."""

    class Rank:
        class fetch:
            @staticmethod
            def remote(groups: object) -> object:
                return ray.put([])

        class train:
            @staticmethod
            def remote(step: int) -> object:
                high = step >= 20
                return ray.put(
                    {
                        "objective/kl_thinking": 0.03 if high else 0.01,
                        "objective/entropy_thinking": 0.6 if high else 0.4,
                        "objective/positions_thinking": 100.0,
                    }
                )

    group = LearnerGroup(LearnerSpec(model_path="unused", total_steps=1), RANK_OPTIONS)
    group._ranks = [Rank]

    async def scenario() -> list[float]:
        return [(await group.train([], step))["objective/collapse_warning"] for step in range(40)]

    assert sum(asyncio.run(scenario())) == 1.0
    assert "KL and entropy rise together" in caplog.text


def test_a_rank_that_cannot_start_is_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        group = LearnerGroup(LearnerSpec(model_path=str(tmp_path / "nothing"), total_steps=1), RANK_OPTIONS)
        with pytest.raises(LearnerError, match=r"phase start: rank 0 raised"):
            await group.start(None)

    asyncio.run(scenario())


def test_the_driver_side_imports_no_torch() -> None:
    code = "import sys, learner.group, learner.actor; print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
