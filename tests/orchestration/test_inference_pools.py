"""What the recipe says of pools, as it is told to those that keep them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestration import inference_pools
from orchestration.config import Config, parse_config
from orchestration.evaluate import MAX_GROUP
from orchestration.inference_pools import GROUP_GRADING_SLACK_S, make_rollout_pool, make_verifier_pool
from orchestration.logs import RANK_VARIABLE
from orchestration.rollout_pool import ROOM_PER_SEAT
from reward.actor import VerifierActor
from rollout.actor import RolloutActor


def recipe(**sections: Any) -> Config:
    tree = {"name": "t", "model": {"path": "m"}, "data": {"train": {"path": "d"}}, **sections}
    return parse_config(tree, "test")


CONFIG = recipe(
    rollout={"num_actors": 3, "max_num_seqs": 5, "request_timeout_s": 11, "startup_timeout_s": 12},
    reward={"num_actors": 2, "processes_per_actor": 4, "deadline_s": 7},
    pipeline={"max_restarts": 6, "sync_timeout_s": 13},
    learner={"step_timeout_s": 14, "startup_timeout_s": 15},
    algorithm={"group_size": 2 * MAX_GROUP},
)
PLAN: Any = SimpleNamespace(
    engine="an engine",
    verifier="a verifier",
    engine_options={"num_cpus": 2, "runtime_env": {"env_vars": {"OF": "engine"}}},
    verifier_options={"num_cpus": 3, "runtime_env": {"env_vars": {"OF": "verifier"}}},
)


class Recorded:
    """A pool that keeps what it was made of."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        *self.source, self.create, self.size = arguments
        self.options = options


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RolloutPool", "BroadcastPool", "VerifierPool"):
        monkeypatch.setattr(inference_pools, name, type(name, (Recorded,), {}))
    monkeypatch.setattr(inference_pools, "_create", lambda *arguments: arguments)


def made(make: Any, *arguments: Any) -> Any:
    """The recorded pool."""
    return make(*arguments)


def test_the_rollout_pool_is_that_of_the_recipe() -> None:
    pool = made(make_rollout_pool, CONFIG, PLAN)
    assert (type(pool).__name__, pool.size) == ("RolloutPool", 3)
    assert pool.options == {
        "request_timeout_s": 11,
        "hang_timeout_s": 11,
        "startup_timeout_s": 12,
        "sync_timeout_s": 13,
        "republish_timeout_s": 13 + 14 + 15,
        "max_in_flight": ROOM_PER_SEAT * 5,
        "restarts": 6,
    }
    environment = {"OF": "engine", RANK_VARIABLE: "1"}
    options = {"num_cpus": 2, "runtime_env": {"env_vars": environment}}
    assert pool.create(1) == (RolloutActor, options, "an engine")


def test_the_verifier_pool_is_that_of_the_recipe() -> None:
    pool = made(make_verifier_pool, CONFIG, PLAN)
    assert pool.size == 2
    assert pool.options == {
        "group_timeout_s": 2 * MAX_GROUP * 7 + GROUP_GRADING_SLACK_S,
        "groups_per_member": 4,
        "startup_timeout_s": 12,
        "hang_timeout_s": 11,
        "restarts": 6,
    }
    assert pool.create(0)[::2] == (VerifierActor, "a verifier")
    assert pool.create(0)[1]["num_cpus"] == 3


def test_weights_are_broadcast_where_the_recipe_says_so_and_a_learner_sends_them() -> None:
    whole = {"num_gpus": 2}
    config = recipe(pipeline={"transport": "nccl"}, rollout={**whole, "tensor_parallel_size": 2}, learner=whole)
    learner: Any = object()
    pool = made(make_rollout_pool, config, PLAN, learner)
    assert (type(pool).__name__, pool.source) == ("BroadcastPool", [learner, 2])
    assert type(made(make_rollout_pool, config, PLAN)).__name__ == "RolloutPool"
