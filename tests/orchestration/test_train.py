"""What an attempt does around the controller: after a step, at a checkpoint, and beside training."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration import train
from orchestration.config import ConfigError, parse_config
from orchestration.groups_log import GroupsLog
from orchestration.run_state import RunDirectory, RunState
from orchestration.step_metrics import StepMetrics
from orchestration.stopping import StopSignals
from tests.orchestration.simulation import simulated_config
from tests.orchestration.test_evaluate import prompt_set


class Attempt(train.TrainingRun):
    """An attempt at a run without pools, cluster or tracker."""

    def __init__(self, place: Path) -> None:
        self.config = simulated_config(place, tracking__trajectories_every=0)
        self.directory = RunDirectory(self.config.run_dir)
        self.directory.create(self.config, resume=False)
        self.logged: list[tuple[int, Mapping[str, float]]] = []
        self.tracker: Any = SimpleNamespace(log=lambda metrics, step: self.logged.append((step, metrics)))
        self.exporter: Any = SimpleNamespace(export=lambda values: None)
        self.progress: Any = SimpleNamespace(advance=lambda step, values: None)
        self.groups = GroupsLog(self.directory.path, attempt=2)
        self.evaluation = None
        self.stopping = False

    def _pool_metrics(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("alternates", [True, False])
def test_an_engine_that_takes_turns_starts_when_the_learner_has_its_memory(
    alternates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an engine starts, vLLM takes what others allocate on its GPU for its own; elsewhere both start at once."""
    began: list[str] = []

    def pool(name: str) -> Any:
        began.append(name)

        async def start(*_: Any) -> None:
            began.append(f"{name} starts")
            await asyncio.sleep(0)

        return SimpleNamespace(start=start)

    async def reserve(plan: Any) -> None: ...

    monkeypatch.setattr(train, "reserve_learner", reserve)
    monkeypatch.setattr(train, "LearnerGroup", lambda *_: pool("learner"))
    monkeypatch.setattr(train, "make_rollout_pool", lambda *_: pool("rollout"))
    monkeypatch.setattr(train, "make_verifier_pool", lambda *_: pool("verifier"))
    attempt = Attempt(tmp_path)
    share = {"num_gpus": 0.5}
    sections = {"rollout": share, "learner": share, "pipeline": {"max_staleness": 0}} if alternates else {}
    attempt.config = parse_config(attempt.config.model_dump() | sections, "test")
    attempt.plan, attempt.checkpoint, attempt.state = SimpleNamespace(learner=None), None, None  # type: ignore[assignment]
    attempt.started = 0.0
    asyncio.run(attempt._start())
    assert attempt.config.alternates == alternates
    assert (began.index("rollout") > began.index("learner starts")) == alternates


def step_of(*group_ids: str) -> StepMetrics:
    groups: list[Any] = [SimpleNamespace(visit=SimpleNamespace(group_id=group_id)) for group_id in group_ids]
    return StepMetrics(values={"reward/mean": 0.5}, groups=groups)


def test_a_step_writes_which_groups_it_trained(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    asyncio.run(attempt._after_step(3, 5, step_of("p1@0", "p2@1")))
    (line,) = (attempt.directory.path / "groups.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "version": 5, "attempt": 2, "trained": ["p1@0", "p2@1"]}
    assert attempt.logged == [(3, {"reward/mean": 0.5, "sync/version": 5})]


def test_a_resumed_attempt_takes_tracking_back_and_its_checkpoints_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a checkpoint holds is on disk before it is committed."""
    monkeypatch.setattr(train, "make_plan", lambda *_, **__: None)
    monkeypatch.setattr(train, "labelled_pools", frozenset)
    monkeypatch.setattr(train, "MetricsExporter", lambda name: None)
    monkeypatch.setattr(train, "_describe_dataset", lambda resolved: ("toy", "digest", "path"))
    config = simulated_config(tmp_path, tracking__mlflow=False, seed=7)
    resolved: Any = SimpleNamespace(config=config, train=prompt_set("a", "b"), evaluation=())
    directory = RunDirectory(config.run_dir)
    directory.create(config, resume=False)
    first = train.TrainingRun(resolved, directory, StopSignals(), resume=False)
    assert first.stream.state()["seed"] == 7, "the order of the prompts is that of the run's seed"
    first.tracker.log({"reward/mean": 0.5}, 1)
    synced: list[str] = []
    fsync = os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
        )
        with directory.new_checkpoint(RunState(1, 1, first.stream.state()), 2) as aside:
            pass
    everything = synced.index(str(aside / "tracking.json"))
    assert {str(directory.path / name) for name in ("metrics.jsonl", "groups.jsonl")} <= set(synced[:everything])
    key = json.loads((directory.path / "tracking.json").read_text())["run_key"]
    (directory.path / "tracking.json").write_text("{torn")
    again = train.TrainingRun(resolved, RunDirectory(config.run_dir), StopSignals(), resume=True)
    assert json.loads((directory.path / "tracking.json").read_text())["run_key"] == key
    assert again.tracker.attempt == 2 and again.state is not None and again.state.step == 1
    for attempt in (first, again):
        attempt.tracker.close("KILLED")
    resolved.train = prompt_set("a", "c")
    with pytest.raises(ConfigError, match="training data"):  # before the pools, and before tracking counts an attempt
        train.TrainingRun(resolved, RunDirectory(config.run_dir), StopSignals(), resume=True)
    assert json.loads((directory.path / "tracking.json").read_text())["attempt"] == 2


@pytest.mark.parametrize("dies", [True, False])
def test_what_dies_beside_training_says_what_is_lost(dies: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        if dies:
            raise KeyError("no such field")
        await asyncio.sleep(30)

    async def run() -> None:
        task = train._beside(work(), "watching for nodes that go", "none is noticed before it is gone")
        await asyncio.sleep(0)
        if not dies:
            task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)

    asyncio.run(run())
    expected = ["watching for nodes that go ended with KeyError: 'no such field': none is noticed"]
    assert [message[: len(expected[0])] for message in caplog.messages] == (expected if dies else [])
