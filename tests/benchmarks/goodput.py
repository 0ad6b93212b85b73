"""What is left of a run's speed when its processes keep dying: committed steps per second, disturbed over undisturbed.

One real run on this machine, in three legs: undisturbed, disturbed, undisturbed again (what the machine does meanwhile
hits numerator and denominator alike). In the disturbed leg SIGKILL hits a rollout actor, a verifier actor and the
learner in turn. A step counts when its last line in `metrics.jsonl` was written: one that a rebuilt learner had to
repeat counts once, late. The gate is the ledger of the checkpoint with which the run stops.
"""

from __future__ import annotations

import itertools
import signal
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.benchmarks.row import Row
from tests.chaos.faults import hit, ledger
from tests.end_to_end.recipes import Run, make_inputs, recipe

ACTORS = 2
"""Of each pool of actors."""
CHECKPOINT_EVERY = 50
"""The default: a few seconds of these steps, near the square root of 2 x (cost of one) x (time between deaths)."""
POOLS = {"ray::RolloutActor": "rollout", "ray::VerifierActor": "verifier", "ray::LearnerRank": "learner"}
"""Who is killed, in turn, and what its metrics are called."""
WARM_UP_STEPS = 20


@dataclass(frozen=True, slots=True)
class Legs:
    """Seconds of a measurement; the defaults take 15 minutes on two cores."""

    undisturbed_s: float = 75.0
    """Of each of the two undisturbed legs."""
    kill_every_s: float = 120.0
    kills: int = 6


@dataclass(frozen=True, slots=True)
class Kill:
    """One death, in wall-clock seconds."""

    victim: str
    at: float


def run(names: set[str] | None) -> list[Row]:
    """Row `goodput/kills`."""
    if names is not None and "goodput/kills" not in names:
        return []
    return [measure(Legs())]


def measure(legs: Legs) -> Row:
    """The run with its legs, the gate, the ratio."""
    with tempfile.TemporaryDirectory(prefix="softgrpo-goodput-") as folder:
        disturbed = _start(Path(folder))
        try:
            borders, kills = _disturb(disturbed, legs)
        finally:
            if disturbed.process.poll() is None:
                disturbed.process.send_signal(signal.SIGTERM)
        assert disturbed.wait(180) == 75, disturbed.tail()
        _check(disturbed, kills)
        return _row(legs, disturbed.metrics(), borders, kills)


def _disturb(running: Run, legs: Legs) -> tuple[list[float], list[Kill]]:
    """All legs: their four borders in wall-clock seconds, and the kills."""
    running.wait_for_step(WARM_UP_STEPS)
    borders = [time.time()]
    _let_run(running, legs.undisturbed_s)
    borders.append(time.time())
    kills = []
    for victim in itertools.islice(itertools.cycle(POOLS), legs.kills):
        kills.append(Kill(victim, time.time()))
        hit(running, victim)
        _let_run(running, legs.kill_every_s)
    borders.append(time.time())
    _let_run(running, legs.undisturbed_s)
    return [*borders, time.time()], kills


def _start(folder: Path) -> Run:
    config = recipe(
        make_inputs(folder / "inputs"),
        folder / "run",
        steps=10**6,
        rollout__num_actors=ACTORS,
        reward__num_actors=ACTORS,
        checkpoint__every_steps=CHECKPOINT_EVERY,
        checkpoint__stop_grace_s=60,
        learner__learning_rate=1e-6,
        tracking={"mlflow": False, "trajectories_every": 0},
    )
    return Run(config)


def _let_run(running: Run, seconds: float) -> None:
    until = time.monotonic() + seconds
    running.wait_until(lambda: time.monotonic() > until, "the leg to end", seconds + 60)


def _check(stopped: Run, kills: list[Kill]) -> None:
    """Nothing was lost, nothing was trained twice, no death went unnoticed."""
    lines = stopped.metrics()
    ledger(stopped, steps=lines[-1]["step"], groups_per_step=4)
    deaths = [kill.victim for kill in kills]
    repeated = len(lines) - len({line["step"] for line in lines})
    assert repeated <= CHECKPOINT_EVERY * deaths.count("ray::LearnerRank"), f"{repeated} steps were repeated"
    for victim, pool in POOLS.items():
        assert lines[-1].get(f"failures/{pool}_restarts", 0) >= deaths.count(victim), f"{pool}: a kill went unnoticed"


def _row(legs: Legs, lines: list[dict[str, Any]], borders: list[float], kills: list[Kill]) -> Row:
    committed = sorted({line["step"]: line["time"] for line in lines}.values())

    def rate(start: float, end: float) -> float:
        return sum(start < moment <= end for moment in committed) / (end - start)

    before, during, after = (rate(start, end) for start, end in itertools.pairwise(borders))
    undisturbed = (before + after) / 2
    lost, whole = defaultdict(list), defaultdict(list)
    for kill, end in zip(kills, [*(kill.at for kill in kills[1:]), borders[2]], strict=True):
        name = POOLS[kill.victim]
        lost[name].append((end - kill.at) * (1 - rate(kill.at, end) / undisturbed))
        whole[name].append(_recovered(kill, lines) - kill.at)
    recoveries = "; ".join(
        f"{name} whole again after {fmean(whole[name]):.0f} s, {fmean(lost[name]):.0f} s of steps lost" for name in lost
    )
    mean_lost = fmean(seconds for of_victim in lost.values() for seconds in of_victim)
    still = fmean(seconds for of_victim in whole.values() for seconds in of_victim)
    detail = (
        f"{undisturbed:.2f} steps/s undisturbed ({before:.2f} before, {after:.2f} after), {during:.2f} with a kill "
        f"every {legs.kill_every_s:.0f} s for {borders[2] - borders[1]:.0f} s; {recoveries}; {mean_lost:.0f} s lost a "
        f"kill; floor {1 - still / legs.kill_every_s:.2f} (a run that stands still until all is whole); ledger balanced"
    )
    return Row("goodput/kills", during / undisturbed, 0.7, detail)


def _recovered(kill: Kill, lines: list[dict[str, Any]]) -> float:
    """When a step first ended with the dead one replaced; a pool must be whole, the learner trains only when it is."""
    name = POOLS[kill.victim]
    before = [line.get(f"failures/{name}_restarts", 0) for line in lines if line["time"] <= kill.at]
    return float(
        next(
            line["time"]
            for line in lines
            if line["time"] > kill.at
            and line.get(f"failures/{name}_restarts", 0) > before[-1]
            and line.get(f"pool/{name}_actors", ACTORS) == ACTORS
        )
    )
