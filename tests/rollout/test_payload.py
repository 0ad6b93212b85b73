"""Recordings: rows in, trajectories out, few bytes in between."""

from __future__ import annotations

import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from rollout.payload import PayloadError, Recording, drawn_log_density
from rollout.request import RolloutRequest
from rollout.soft_token import SoftTokenParams
from rollout.trajectory import Kind

PARAMS = SoftTokenParams(max_candidates=10, top_k=10)


def rows(token: int, kind: Kind, version: int, *, columns: int = 10) -> SimpleNamespace:
    ids = np.arange(1 + columns, dtype=np.int64)[None] + 100
    ids[0, 0] = token
    values = np.linspace(-1, 1, 2 + 3 * columns if columns else 1, dtype=np.float32)[None]
    ranks = np.array([(version << 2) | int(kind)])
    return SimpleNamespace(logprob_token_ids=ids, logprobs=values, sampled_token_ranks=ranks)


def recording(thinking: str = "soft") -> Recording:
    return Recording(RolloutRequest("a/0", "a", "a", 0, 1, (5, 6), thinking), PARAMS, None)  # type: ignore[arg-type]


def test_rows_become_a_trajectory() -> None:
    record = recording()
    record.append([7], rows(7, Kind.SOFT, 3))
    record.append([4], rows(4, Kind.ENDED, 3))
    record.append([9], rows(9, Kind.DISCRETE, 4, columns=0))
    trajectory = record.finish("stop")
    assert trajectory.response_ids.tolist() == [7, 4, 9]
    assert trajectory.kinds.tolist() == [Kind.SOFT, Kind.ENDED, Kind.DISCRETE]
    assert trajectory.versions.tolist() == [3, 3, 4]
    assert trajectory.candidate_ids.tolist() == [list(range(101, 111))]
    values = np.linspace(-1, 1, 32, dtype=np.float32)
    np.testing.assert_array_equal(trajectory.censor_threshold, values[1:2])
    np.testing.assert_array_equal(trajectory.candidate_logprobs[0], values[2:12])
    np.testing.assert_array_equal(trajectory.noise[0], values[12:22])
    np.testing.assert_array_equal(trajectory.weights[0], values[22:])
    e = values[12:22].astype(np.float64)
    np.testing.assert_allclose(trajectory.log_density, [(-e - np.exp(-e)).sum(), -1.0, -1.0], rtol=1e-6)


@pytest.mark.parametrize("missing", ["all", "one", "other token"])
def test_tokens_without_their_rows_are_an_error(missing: str) -> None:
    record = recording()
    with pytest.raises(PayloadError, match="request a/0"):
        if missing == "all":
            record.append([7], None)
        elif missing == "one":
            record.append([7, 8], rows(7, Kind.SOFT, 0))
        else:
            record.append([8], rows(7, Kind.SOFT, 0))


def test_memory_in_flight_stays_under_the_bound() -> None:
    """At K = 10 at most 1.1 kB per token between steps, doubling included."""
    row = rows(7, Kind.SOFT, 1)
    recordings = [recording() for _ in range(8)]
    count = 1100  # just past a doubling: the worst case
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(count):
        for record in recordings:
            record.append([7], row)
    per_token = (tracemalloc.get_traced_memory()[0] - before) / (count * len(recordings))
    tracemalloc.stop()
    assert per_token < 400


def test_log_density_of_every_family() -> None:
    log_p = np.log(
        np.array([[0.7, 0.3, 0.0]], dtype=np.float32), where=[[True, True, False]], out=np.full((1, 3), -np.inf)
    )
    e = np.array([[0.5, -0.2, 0.0]], dtype=np.float32)

    def density(**changes: object) -> float:
        return float(drawn_log_density(e, log_p, SoftTokenParams(max_candidates=3, top_k=3, **changes))[0])  # type: ignore[arg-type]

    gumbel = sum(-x - math.exp(-x) for x in (0.5, -0.2))
    assert density() == pytest.approx(gumbel, rel=1e-6)
    assert density(noise="none") == 0.0
    sigma = 0.05 * 2.0
    normal = sum(
        -0.5 * ((x - p) / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi)) for x, p in ((0.5, 0.7), (-0.2, 0.3))
    )
    assert density(noise="gaussian", noise_scale=2.0) == pytest.approx(normal, rel=1e-5)
    e = np.array([[0.5, 0.2, 0.0]], dtype=np.float32)
    gamma = sum((p - 1) * math.log(x) - x - math.lgamma(p) for x, p in ((0.5, 0.7), (0.2, 0.3)))
    assert density(noise="dirichlet") == pytest.approx(gamma, rel=1e-5)
