"""What bounded staleness buys: the real controller on a simulated clock with log-normal response lengths.

Ideal rate: both pools busy all the time, so a batch takes max(generation work, training work); the split is balanced.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.benchmarks.row import Row
from tests.orchestration.simulation import Simulation, Timing, simulated_config

ACTORS, SLOTS = 4, 64
GROUP, PROMPTS = 8, 64
STEPS = 60
TIMING = Timing(sigma=0.8, mean_length=4000, cap=16000)


def run(names: set[str] | None) -> list[Row]:
    """Rows `async_schedule/bound2` and `async_schedule/ideal4`; the age of every trained group is checked first."""
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
    rows = [
        Row("async_schedule/bound2", rates[2] / rates[0], 2.2, detail),
        Row("async_schedule/ideal4", rates[4] / ideal, 0.9, detail),
    ]
    return [row for row in rows if names is None or row.name in names]


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
