"""Thirty kills of drivers and thirty of actors at random moments of real runs: the ledger balances at the end.

Every run takes twenty blows: SIGKILL for the driver, which is then started with `--resume`, SIGKILL or SIGSTOP for a
rollout actor, a verifier actor or a learner rank. The next blow falls at a random moment after the run has recovered;
a driver may die again while it starts. One of the runs is on a cluster of several nodes.
`SOFTGRPO_CHAOS_SEED` repeats the blows of a failure (it names the seed), `SOFTGRPO_CHAOS_KILLS` changes their numbers.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.faults import committed_once, hit, kill_driver, setbacks, stop
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

SEED = int(os.environ.get("SOFTGRPO_CHAOS_SEED", random.randrange(10**6)))
KILLS = int(os.environ.get("SOFTGRPO_CHAOS_KILLS", 30))
"""Of drivers, over all runs; and as many blows to actors."""
EVERY = 10
"""Steps between checkpoints."""
PROMPTS = 40
"""So few that a run passes over them many times."""
RECOVERY_DEADLINE_S = 300.0
BLOWS = (
    ("LearnerRank", signal.SIGKILL, 2),
    ("LearnerRank", signal.SIGSTOP, 1),
    ("RolloutActor", signal.SIGKILL, 2),
    ("RolloutActor", signal.SIGSTOP, 1),
    ("VerifierActor", signal.SIGKILL, 1),
    ("VerifierActor", signal.SIGSTOP, 1),
)
"""Which actor, how, and how often relative to the others."""
DIES_IN_ITS_START = 0.3
"""Chance that a blow to the driver does not wait until the run has recovered from the one before."""
START_S = 20.0
RUNS: tuple[dict[str, Any], ...] = (
    {},
    {"pipeline__transport": "delta", "pipeline__max_staleness": 0},
    {"learner__world_size": 2},
)
ON_SEVERAL_NODES = 0
DEADLINES: dict[str, Any] = {
    "rollout__request_timeout_s": 15,
    "reward__deadline_s": 1,
    "learner__step_timeout_s": 20,
    "learner__collective_timeout_s": 60,
    "pipeline__sync_timeout_s": 20,
    "pipeline__max_restarts": 100,
    "checkpoint__stop_grace_s": 60,
}
"""Short enough that a hang is noticed soon, long enough for a busy machine."""


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_random_kills(number: int, tmp_path: Path) -> None:
    kills = len(range(number, KILLS, len(RUNS)))
    with several_nodes() if number == ON_SEVERAL_NODES else one_node() as cluster:
        story = Story(tmp_path, RUNS[number] | cluster, random.Random(SEED + number))
        try:
            story.play(kills)
        except Exception as error:
            error.add_note(f"SOFTGRPO_CHAOS_SEED={SEED} run {number}, blows so far: {', '.join(story.blows)}")
            raise


@contextmanager
def one_node() -> Iterator[dict[str, Any]]:
    """The driver starts Ray itself, and Ray dies with it."""
    yield {}


@contextmanager
def several_nodes() -> Iterator[dict[str, Any]]:
    """A head without work and three nodes, which outlive every driver; how a recipe names them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
        yield {"cluster__address": cluster.address}
    finally:
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)


class Story:
    """One logical run and what happened to it."""

    def __init__(self, place: Path, changes: dict[str, Any], rng: random.Random) -> None:
        self.inputs = make_inputs(place / "inputs")
        settings: dict[str, Any] = {
            "steps": 10**6,
            "rollout__num_actors": 2,
            "reward__num_actors": 2,
            "checkpoint__every_steps": EVERY,
            "data__train__limit": PROMPTS,
            "tracking": {"mlflow": False, "trajectories_every": 25},
        }
        self.config = recipe(self.inputs, place / "run", **(settings | DEADLINES | changes))
        self.run = Run(self.config)
        self.bound = int(changes.get("pipeline__max_staleness", 1))
        self.rng = rng
        self.reached = 2
        """The step after which the run must go on."""
        self.blows: list[str] = []

    def play(self, kills: int) -> None:
        """So many blows to the driver and as many to its actors, a graceful end, the ledger."""
        actors = self.rng.choices(BLOWS, weights=[weight for *_, weight in BLOWS], k=kills)
        blows = [("driver", signal.SIGKILL)] * kills + [(name, number) for name, number, _ in actors]
        self.rng.shuffle(blows)
        for victim, number in blows:
            self._await_a_moment(victim)
            self.blows.append(f"{number.name} {victim} after step {self.reached}")
            if victim == "driver":
                kill_driver(self.run)
                self.run = Run(self.config, "--resume")
            else:
                self._strike_actor(victim, number)
        self._recover()
        self._check(stop(self.run, groups_per_step=4, bound=self.bound))

    def _await_a_moment(self, victim: str) -> None:
        dies_again = bool(self.blows) and victim in self.blows[-1] and self.rng.random() < DIES_IN_ITS_START
        if victim == "driver" and dies_again:
            time.sleep(self.rng.uniform(0.0, START_S))
            return
        self._recover()
        time.sleep(self.rng.uniform(0.0, 5.0))
        self.reached = self.run.metrics()[-1]["step"]

    def _recover(self) -> None:
        self._wait(self._went_on(self.reached), f"a step beyond {self.reached}, all actors in service")

    def _strike_actor(self, victim: str, number: signal.Signals) -> None:
        present = self._pids(victim)
        dead = hit(self.run, f"ray::{victim}", number, which=self.rng.randrange(len(present)))
        # A rank takes its peers with it: all of them are replaced.
        gone = present if victim == "LearnerRank" else {dead}
        self._wait(lambda: len(self._pids(victim) - gone) == len(present), f"a replacement of {victim} {dead}")

    def _went_on(self, reached: int) -> Any:
        marked = time.time()

        def went_on() -> bool:
            lines = self.run.metrics()[-1:]
            return bool(lines) and lines[0]["time"] > marked and lines[0]["step"] > reached and _in_service(lines[0])

        return went_on

    def _pids(self, name: str) -> set[int]:
        return {process.pid for process in self.run.actors(f"ray::{name}")}

    def _wait(self, condition: Any, what: str) -> None:
        self.run.wait_until(condition, what, RECOVERY_DEADLINE_S)

    def _check(self, counts: dict[str, int]) -> None:
        costly = sum("driver" in blow or "LearnerRank" in blow for blow in self.blows)
        repeated = setbacks(self.run)
        assert max(repeated, default=0) <= EVERY, f"{max(repeated)} steps were repeated at once"
        assert len(repeated) <= costly, "steps were repeated without a death that explains it"
        assert not any(key.startswith("failed") for key in counts), "a fault of ours is no fault of a group"
        last = self.run.metrics()[-1]["step"]
        # What was in flight or to be repeated at the end is less than two passes.
        assert committed_once(self.run, last) >= 4 * last // PROMPTS - 3, "a prompt was left behind"


def _in_service(line: dict[str, Any]) -> bool:
    return bool(line["pool/rollout_actors"] == 2 and line["pool/verifier_actors"] == 2)
