"""What bounded staleness buys: the real controller on a simulated clock, and the demo's recipe on this machine.

Simulated: log-normal response lengths; the ideal rate has both pools busy all the time, with work split evenly.
`async_schedule/demo`: steps per second at bound 1 over bound 0, start-up left out, A-B-A-B, three minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any

from orchestration.metrics_log import read_metrics
from orchestration.progress import POOLS
from tests.benchmarks.row import Row
from tests.end_to_end.recipes import ROOT
from tests.orchestration.simulation import Simulation, Timing, simulated_config

ACTORS, SLOTS = 4, 64
GROUP, PROMPTS = 8, 64
STEPS = 60
DEMO_STEPS = 40
DEMO_DEADLINE_S = 600.0
TIMING = Timing(sigma=0.8, mean_length=4000, cap=16000)


def run(names: set[str] | None) -> list[Row]:
    """Rows `async_schedule/bound2`, `/ideal4` and `/demo`; the age of every trained group is checked first."""
    rows: list[Row] = []
    if names is None or names & {"async_schedule/bound2", "async_schedule/ideal4"}:
        rows += _simulated()
    if names is None or "async_schedule/demo" in names:
        rows.append(_demo())
    return [row for row in rows if names is None or row.name in names]


def _simulated() -> list[Row]:
    batch_s = _ideal_batch_s()
    rates, worst_age, dropped = {}, {}, {}
    for bound in (0, 2, 4):
        simulation = _simulate(bound, batch_s)
        rates[bound] = STEPS / simulation.elapsed_s
        worst_age[bound] = max(simulation.ages)
        counts = simulation.controller.slots.counts
        dropped[bound] = counts["dropped/age"] / counts["dispatched"]
    for bound in rates:
        assert worst_age[bound] <= bound, f"age {worst_age[bound]} at bound {bound}"
        assert dropped[bound] < 0.01, f"{dropped[bound]:.1%} dropped at bound {bound}"
    ideal = 1 / batch_s
    shares = ", ".join(f"bound {bound}: {rate / ideal:.2f} of the ideal" for bound, rate in rates.items())
    detail = f"{shares}; no drops, age <= bound; {STEPS} steps of {PROMPTS} x {GROUP}, sigma {TIMING.sigma}"
    return [
        Row("async_schedule/bound2", rates[2] / rates[0], 2.2, detail),
        Row("async_schedule/ideal4", rates[4] / ideal, 0.9, detail),
    ]


def _demo() -> Row:
    """The demo's recipe, bound 1 and bound 0 in turn; the median of two runs each."""
    rates: dict[int, list[float]] = {0: [], 1: []}
    idle: dict[tuple[int, str], list[float]] = {(bound, pool): [] for bound in (0, 1) for pool in POOLS}
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(2):
            for bound in (0, 1):
                lines = _run_demo(Path(folder), bound, attempt)
                assert max(line["staleness/max"] for line in lines) <= bound
                rates[bound].append((len(lines) - 1) / (lines[-1]["time"] - lines[0]["time"]))
                for pool in POOLS:
                    idle[bound, pool].append(fmean(line[f"idle/{pool}"] for line in lines[1:]))
    shares = {bound: ", ".join(f"{pool} {fmean(idle[bound, pool]):.0%}" for pool in POOLS) for bound in rates}
    detail = "; ".join(f"bound {bound}: {median(rates[bound]):.2f} steps/s, idle {shares[bound]}" for bound in rates)
    return Row("async_schedule/demo", median(rates[1]) / median(rates[0]), 1.1, detail)


def _run_demo(place: Path, bound: int, attempt: int) -> list[dict[str, Any]]:
    run_dir = place / f"bound{bound}-{attempt}"
    overrides = [
        f"pipeline.max_staleness={bound}",
        f"output_dir={run_dir}",
        f"steps={DEMO_STEPS}",
        "evaluation.before_and_after=false",
        "tracking.mlflow=false",
        "tracking.trajectories_every=0",
        "checkpoint.every_steps=1000",
    ]
    command = [sys.executable, "-m", "orchestration", "train", "--config", "configs/demo.yaml", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEMO_DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if "staleness/max" in line]


def _ideal_batch_s() -> float:
    """Seconds in which the rollout pool, always full, decodes one batch; training is given as long."""
    step_s = TIMING.base_step_s + TIMING.step_per_response_s * SLOTS
    return GROUP * PROMPTS * TIMING.mean_length * step_s / (ACTORS * SLOTS)


def _simulate(bound: int, train_s: float) -> Simulation:
    with tempfile.TemporaryDirectory() as folder:
        config = simulated_config(
            Path(folder),
            steps=STEPS,
            algorithm__group_size=GROUP,
            algorithm__prompts_per_step=PROMPTS,
            pipeline__max_staleness=bound,
            checkpoint__every_steps=10**6,
        )
        timing = Timing(**{**vars(TIMING), "train_s": train_s})
        return Simulation(config, actors=ACTORS, slots_per_actor=SLOTS, timing=timing, prompts=10**4).run()
