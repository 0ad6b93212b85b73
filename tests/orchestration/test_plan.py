"""What a plan asks of Ray for each pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestration.config import parse_config
from orchestration.plan import make_plan
from orchestration.validate import Resolved


def resolved(**sections: Any) -> Resolved:
    tree = {"name": "t", "model": {"path": "m"}, "data": {"train": {"path": "t.jsonl"}}, **sections}
    return Resolved(parse_config(tree, "test"), Path("m"), None, None, 4, None, (), (), ())


@pytest.mark.parametrize(("max_staleness", "prompts_per_step"), [(0, 4), (1, 2048), (4, 4096)])
def test_a_ping_never_queues_behind_groups(max_staleness: int, prompts_per_step: int) -> None:
    """All outstanding groups may lie on one actor, each in a call of its own."""
    sections = {"pipeline": {"max_staleness": max_staleness}, "algorithm": {"prompts_per_step": prompts_per_step}}
    outstanding = (max_staleness + 1) * prompts_per_step
    assert make_plan(resolved(**sections), 0).engine_options["max_concurrency"] >= outstanding + 500


def test_greedy_decoding_can_be_planned() -> None:
    """An evaluation starts no learner, and its plan is made of the same recipe."""
    plan = make_plan(resolved(sampling={"temperature": 0, "answer": {"temperature": 0}}), 0)
    assert plan.engine.answer_temperature == 0
