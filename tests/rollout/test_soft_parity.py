"""The engine against the naive loop: the same tokens, kinds, candidates, noise and weights, whatever the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout.engine import SoftEngine
from rollout.trajectory import Kind, Trajectory
from tests.rollout.conftest import Case, base_spec, mixed_cases, run
from tests.rollout.naive_loop import Position

pytestmark = pytest.mark.slow

NEAR_TIE = 2e-5
"""A decision this close to another one may fall either way after fp32 rounding in another order."""
TOLERANCE = 2e-4


@pytest.fixture(scope="session")
def cases(parity_model: Any, parity_model_dir: Path) -> list[Case]:
    return mixed_cases(parity_model, base_spec(parity_model_dir), count=64, seed=7)


def differences(case: Case, found: Trajectory) -> str | None:
    """What is different, or None; after a near-tie the rest cannot be compared."""
    for index, expected in enumerate(case.expected):
        if index >= len(found.response_ids):
            return f"{case.request.request_id}: ends at {index}, expected {len(case.expected)}"
        same = found.response_ids[index] == expected.token and found.kinds[index] == expected.kind
        problem = None if same else f"token {found.response_ids[index]}, expected {expected.token}"
        problem = problem or position_difference(expected, found, index)
        if problem is not None:
            return f"{case.request.request_id}[{index}], margin {expected.margin:.1e}: {problem}"
    if len(found.response_ids) != len(case.expected):
        return f"{case.request.request_id}: {len(found.response_ids)} tokens, expected {len(case.expected)}"
    return None


def position_difference(expected: Position, found: Trajectory, index: int) -> str | None:
    if abs(found.log_density[index] - expected.log_density) > 20 * TOLERANCE:
        return f"log-density {found.log_density[index]}, expected {expected.log_density}"
    if expected.kind != Kind.SOFT:
        return None
    row = int((found.kinds[:index] == Kind.SOFT).sum())
    kept = found.candidate_logprobs[row] > -np.inf
    if found.candidate_ids[row][kept].tolist() != expected.ids.tolist():
        return f"candidates {found.candidate_ids[row][kept]}, expected {expected.ids}"
    if not np.array_equal(found.noise[row][kept], expected.noise.astype(np.float32)):
        return "other noise"
    for name, want in (("candidate_logprobs", expected.logprobs), ("weights", expected.weights)):
        gap = np.abs(getattr(found, name)[row][kept] - want).max()
        if gap > (10 if name == "weights" else 1) * TOLERANCE:
            return f"{name} differ by {gap}"
    return None


def assert_parity(cases: list[Case], found: dict[str, Trajectory], *, max_ties: int = 1) -> None:
    """Token-exact, but for at most `max_ties` requests that part at a documented near-tie."""
    assert found.keys() == {case.request.request_id for case in cases}
    problems = []
    ties = 0
    for case in cases:
        trajectory = found[case.request.request_id]
        problem = differences(case, trajectory)
        if problem is None:
            continue
        index = int(problem.split("[")[1].split("]")[0]) if "[" in problem else -1
        if index >= 0 and case.expected[index].margin < NEAR_TIE:
            ties += 1
        else:
            problems.append(problem)
    assert not problems, "\n".join(problems)
    assert ties <= max_ties


def test_sixty_four_mixed_requests_with_chunked_prefill(engine: SoftEngine, cases: list[Case]) -> None:
    found = run(engine, cases)
    assert_parity(cases, found)
    kinds = np.concatenate([trajectory.kinds for trajectory in found.values()])
    assert all((kinds == kind).sum() >= 10 for kind in (Kind.SOFT, Kind.DISCRETE, Kind.FORCED))
    assert (kinds == Kind.ENDED).sum() >= 3
