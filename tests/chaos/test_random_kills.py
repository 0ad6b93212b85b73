"""Thirty kills at random moments of real runs: whatever dies, however and whenever, the ledger balances at the end.

Every run takes ten blows: SIGKILL or SIGSTOP for a rollout actor, a verifier actor or a learner rank, SIGKILL for the
driver, which is then started with `--resume`. The next blow falls at a random moment after the run has recovered.
`SOFTGRPO_CHAOS_SEED` repeats the blows of a failure (it names the seed), `SOFTGRPO_CHAOS_KILLS` changes their number.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestration.run_state import load_state
from tests.chaos.faults import hit, stop
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

SEED = int(os.environ.get("SOFTGRPO_CHAOS_SEED", random.randrange(10**6)))
KILLS = int(os.environ.get("SOFTGRPO_CHAOS_KILLS", 30))
EVERY = 10
"""Steps between checkpoints."""
RECOVERY_DEADLINE_S = 300.0
BLOWS = (
    ("driver", signal.SIGKILL, 2),
    ("LearnerRank", signal.SIGKILL, 2),
    ("LearnerRank", signal.SIGSTOP, 1),
    ("RolloutActor", signal.SIGKILL, 2),
    ("RolloutActor", signal.SIGSTOP, 1),
    ("VerifierActor", signal.SIGKILL, 1),
    ("VerifierActor", signal.SIGSTOP, 1),
)
"""Who, how, and how often relative to the others."""
ACTORS = ("LearnerRank", "RolloutActor", "VerifierActor")
RUNS: tuple[dict[str, Any], ...] = (
    {},
    {"pipeline__transport": "delta", "pipeline__max_staleness": 0},
    {"learner__world_size": 2},
)
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
    story = Story(tmp_path, RUNS[number], random.Random(SEED + number))
    try:
        story.play(kills)
    except Exception as error:
        error.add_note(f"SOFTGRPO_CHAOS_SEED={SEED} run {number}, blows so far: {', '.join(story.blows)}")
        raise


class Story:
    """One logical run and what happened to it."""

    def __init__(self, place: Path, changes: dict[str, Any], rng: random.Random) -> None:
        self.inputs = make_inputs(place / "inputs")
        settings: dict[str, Any] = {
            "steps": 10**6,
            "rollout__num_actors": 2,
            "reward__num_actors": 2,
            "checkpoint__every_steps": EVERY,
            "tracking": {"mlflow": False, "trajectories_every": 25},
        }
        self.config = recipe(self.inputs, place / "run", **(settings | DEADLINES | changes))
        self.run = Run(self.config)
        self.bound = int(changes.get("pipeline__max_staleness", 1))
        self.rng = rng
        self.blows: list[str] = []

    def play(self, kills: int) -> None:
        """That many blows, a graceful end, the ledger."""
        self.run.wait_for_step(3)
        for _ in range(kills):
            time.sleep(self.rng.uniform(0.0, 5.0))
            self._strike()
        self._check(stop(self.run, groups_per_step=4, bound=self.bound))

    def _strike(self) -> None:
        victim, number, _ = self.rng.choices(BLOWS, weights=[weight for *_, weight in BLOWS])[0]
        reached = self.run.metrics()[-1]["step"]
        self.blows.append(f"{number.name} {victim} after step {reached}")
        if victim == "driver":
            self._resume_after_death()
        else:
            present = self._pids(victim)
            dead = hit(self.run, f"ray::{victim}", number, which=self.rng.randrange(len(present)))
            # A rank takes its peers with it: all of them are replaced.
            gone = present if victim == "LearnerRank" else {dead}
            self._wait(lambda: len(self._pids(victim) - gone) == len(present), f"a replacement of {victim} {dead}")
        self._wait(self._went_on(reached), f"a step beyond {reached}, all actors in service")

    def _resume_after_death(self) -> None:
        workers = [worker for name in ACTORS for worker in self.run.actors(f"ray::{name}")]
        workers += [child for worker in workers for child in worker.children(recursive=True)]
        self.run.kill()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, f"outlive the driver: {alive}"
        self.run = Run(self.config, "--resume")

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
        lines = self.run.metrics()
        costly = sum("driver" in blow or "LearnerRank" in blow for blow in self.blows)
        setbacks = [max(0, one["step"] - two["step"] + 1) for one, two in itertools.pairwise(lines)]
        assert max(setbacks) <= EVERY, f"{max(setbacks)} steps were repeated at once"
        assert sum(setback > 0 for setback in setbacks) <= costly, (
            "steps were repeated without a death that explains it"
        )
        # Every visit of a prompt that was ever issued was trained once, failed, or waits to be issued again.
        state = load_state(self.run.run_dir / "checkpoints" / f"step_{lines[-1]['step']:06d}")
        prompts = sum(1 for _ in (self.inputs / "train.jsonl").open(encoding="utf-8"))
        issued = state.stream["epoch"] * prompts + state.stream["position"]
        failed = sum(count for key, count in counts.items() if key.startswith("failed"))
        assert issued == counts["trained"] + failed + len(state.pending)
        assert failed == 0, "a fault of ours is no fault of a group"


def _in_service(line: dict[str, Any]) -> bool:
    return bool(line["pool/rollout_actors"] == 2 and line["pool/verifier_actors"] == 2)
