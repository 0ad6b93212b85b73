"""When a run evaluates: once per due step, never twice after a resume, beside training, best checkpoint kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestration.config import Config, parse_config
from orchestration.evaluate import EvaluationSettings, evaluate
from orchestration.failures import GroupFailed
from orchestration.run_evaluation import RunEvaluation
from orchestration.run_state import RunDirectory, RunState
from tests.orchestration.test_evaluate import MemoryPools, prompt_set


def config(step_timeout_s: float, thinking: str = "soft", **evaluation: Any) -> Config:
    tree = {
        "name": "run",
        "seed": 7,
        "sampling": {"thinking": thinking},
        "steps": 6,
        "model": {"path": "model"},
        "data": {"train": {"path": "train.jsonl"}},
        "evaluation": {"samples": 4, **evaluation},
        "learner": {"step_timeout_s": step_timeout_s},
    }
    return parse_config(tree, "test")


class Harness:
    def __init__(self, directory: Path, pools: Any = None, *, step_timeout_s: float = 60, **evaluation: Any) -> None:
        self.logged: list[tuple[int, Mapping[str, float]]] = []
        self.pools = pools or MemoryPools()
        self.directory = RunDirectory(directory)
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.evaluation = RunEvaluation(
            config(step_timeout_s, **evaluation),
            (prompt_set("a", "b"),),
            self.pools,
            self.directory,
            lambda metrics, step: self.logged.append((step, metrics)),
        )


def test_before_and_after_make_the_summary(tmp_path: Path) -> None:
    harness = Harness(tmp_path)

    async def run() -> None:
        await harness.evaluation.before()
        harness.pools.is_correct = lambda prompt, index: True
        await harness.evaluation.finish(6)

    asyncio.run(run())
    record = json.loads((tmp_path / "summary.json").read_text())
    assert record["before"] == {"pass@1": 0.25, "pass@16": 1.0, "mean_length": 11.5}
    assert record["after"]["pass@1"] == 1.0
    assert record["seconds"] >= 0
    assert record["datasets"]["toy"]["before"]["pass@1"] == 0.25
    assert [step for step, _ in harness.logged] == [0, 6]


@pytest.mark.parametrize("thinking", ["soft", "discrete"])
def test_the_policy_is_asked_as_it_is_trained(thinking: str, tmp_path: Path) -> None:
    harness = Harness(tmp_path, thinking=thinking, limit=1)
    asyncio.run(harness.evaluation.before())
    asked = MemoryPools()
    asyncio.run(evaluate(asked, prompt_set("a"), EvaluationSettings(samples=4, seed=7)))
    assert [(r.prompt_id, r.seed) for r in harness.pools.requests] == [(r.prompt_id, r.seed) for r in asked.requests]
    assert {request.thinking for request in harness.pools.requests} == {thinking}


def test_a_resumed_run_does_not_repeat_an_evaluation(tmp_path: Path) -> None:
    asyncio.run(Harness(tmp_path).evaluation.before())
    resumed = Harness(tmp_path)
    asyncio.run(resumed.evaluation.before())
    assert not resumed.pools.requests
    asyncio.run(resumed.evaluation.finish(6))
    assert json.loads((tmp_path / "summary.json").read_text())["before"] is not None


def test_due_steps_run_beside_training_and_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    harness = Harness(tmp_path, every_steps=2)
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir()

    async def run() -> None:
        for step in range(1, 7):
            harness.pools.is_correct = lambda prompt, index, step=step: step < 4 or index == 0
            harness.evaluation.after_step(step)
            await asyncio.sleep(0.02)
        await harness.evaluation.finish(6)

    asyncio.run(run())
    assert [step for step, _ in harness.logged] == [2, 4, 6]
    best = harness.directory.best()
    assert best is not None
    assert (best[0].name, best[1]) == ("step_000002", 1.0)


@pytest.mark.parametrize("gate", ["the evaluation", "the checkpoint"])
def test_a_checkpoint_is_kept_until_its_evaluation_has_ended(gate: str, tmp_path: Path) -> None:
    """However many newer ones come meanwhile, and whichever of the two takes longer."""
    released = asyncio.Event()

    class Gated(MemoryPools):
        async def respond(self, requests: Any) -> Any:
            if gate == "the evaluation":
                await released.wait()
            return await super().respond(requests)

    harness = Harness(tmp_path, Gated(), every_steps=2)

    async def write(step: int, keep_last: int, seconds: float = 0.0) -> None:
        with harness.directory.new_checkpoint(RunState(step, step, {}), keep_last):
            await asyncio.sleep(seconds)

    async def run() -> None:
        harness.evaluation.after_step(2)
        await write(2, 1, seconds=0.3 if gate == "the checkpoint" else 0.0)
        for step in (3, 4):
            await write(step, 1)
        released.set()
        while harness.directory.best() is None:
            await asyncio.sleep(0.01)
        await write(5, 1)
        assert names() == ["step_000002", "step_000005"]
        harness.directory.mark_best(harness.directory.checkpoints / "step_000005", 2.0)
        await write(6, 1)
        assert names() == ["step_000005", "step_000006"], "held by nobody any more"

    def names() -> list[str]:
        return sorted(path.name for path in harness.directory.checkpoints.glob("step_*"))

    async def in_time() -> None:
        async with asyncio.timeout(20):
            await run()

    asyncio.run(in_time())


def test_a_checkpoint_that_is_written_for_ever_does_not_hold_the_end_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The writer hangs: an error, and the run ends. What a killed writer left is no writer at all."""
    harness = Harness(tmp_path, every_steps=2, before_and_after=False, step_timeout_s=0.2)
    (tmp_path / "checkpoints" / ".writing-000004").mkdir()

    async def run() -> None:
        async with asyncio.timeout(20):
            with harness.directory.new_checkpoint(RunState(2, 2, {}), 1):
                harness.evaluation.after_step(2)
                await harness.evaluation.finish(2)
            assert "the checkpoint of step 2 is still being written after 0 s" in caplog.text
            assert harness.directory.best() is None
            caplog.clear()
            harness.evaluation.after_step(4)
            await harness.evaluation.finish(4)
            assert "still being written" not in caplog.text

    asyncio.run(run())


@pytest.mark.parametrize("before_and_after", [True, False])
def test_a_due_last_step_is_evaluated_once(before_and_after: bool, tmp_path: Path) -> None:
    """At the end where there is an evaluation, like any other step where there is none."""
    harness = Harness(tmp_path, every_steps=3, before_and_after=before_and_after)
    (tmp_path / "checkpoints" / "step_000006").mkdir()

    async def run() -> None:
        harness.evaluation.after_step(6)
        await asyncio.sleep(0.02)
        assert (harness.pools.requests == []) == before_and_after, "the last one sees one policy version"
        await harness.evaluation.finish(6)

    asyncio.run(run())
    assert [step for step, _ in harness.logged] == [6]
    assert json.loads((tmp_path / "summary.json").read_text())["after"] is not None
    best = harness.directory.best()
    assert best is not None and best[0].name == "step_000006"


def test_a_slow_evaluation_skips_the_next_instead_of_piling_up(tmp_path: Path) -> None:
    class Slow(MemoryPools):
        async def respond(self, requests: Any) -> Any:
            await asyncio.sleep(0.2)
            return await super().respond(requests)

    harness = Harness(tmp_path, Slow(), every_steps=1)

    async def run() -> None:
        harness.evaluation.after_step(1)
        await asyncio.sleep(0)
        harness.evaluation.after_step(2)
        await harness.evaluation.finish(6)

    asyncio.run(run())
    assert (2, {"evaluation/skipped": 1}) in harness.logged
    assert [step for step, metrics in harness.logged if "evaluation/toy/pass@1" in metrics] == [1, 6]


def test_a_failed_group_costs_the_evaluation_beside_training_not_the_run(tmp_path: Path) -> None:
    class Broken(MemoryPools):
        async def score(self, batch: Any, gold: Any, rule: str) -> Any:
            raise GroupFailed("grader lost three times")

    harness = Harness(tmp_path, Broken(), every_steps=1, before_and_after=False)

    async def run() -> None:
        harness.evaluation.after_step(1)
        await harness.evaluation.finish(6)

    asyncio.run(run())
    assert harness.logged == [(1, {"evaluation/failed": 1})]
    assert json.loads((tmp_path / "summary.json").read_text())["after"] is None


def test_nothing_happens_where_nothing_is_wanted(tmp_path: Path) -> None:
    harness = Harness(tmp_path, before_and_after=False)
    asyncio.run(harness.evaluation.before())
    harness.evaluation.after_step(1)
    asyncio.run(harness.evaluation.finish(6))
    assert not harness.pools.requests
