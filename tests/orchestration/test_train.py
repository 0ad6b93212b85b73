"""What an attempt does around the controller: after a step, at a checkpoint, and beside training."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestration import train
from orchestration.groups_log import GroupsLog
from orchestration.run_state import RunDirectory
from orchestration.step_metrics import StepMetrics
from tests.orchestration.simulation import simulated_config


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


def step_of(*group_ids: str) -> StepMetrics:
    groups: list[Any] = [SimpleNamespace(visit=SimpleNamespace(group_id=group_id)) for group_id in group_ids]
    return StepMetrics(values={"reward/mean": 0.5}, groups=groups)


def test_a_step_writes_which_groups_it_trained(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    asyncio.run(attempt._after_step(3, 5, step_of("p1@0", "p2@1")))
    (line,) = (attempt.directory.path / "groups.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "version": 5, "attempt": 2, "trained": ["p1@0", "p2@1"]}
    assert attempt.logged == [(3, {"reward/mean": 0.5, "sync/version": 5})]
