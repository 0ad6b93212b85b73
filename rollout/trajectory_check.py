"""Which rows of a trajectory batch can be replayed: the others are named, the good ones are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rollout.trajectory import Columns, Kind, Trajectory, TrajectoryError, columns, rows, sum_per_row

WEIGHT_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class BadTrajectory:
    """A row that was left out of training, for the log and the loss count."""

    request_id: str
    column: str
    reason: str

    def __str__(self) -> str:
        return f"trajectory {self.request_id}: column {self.column}: {self.reason}"


def validate(
    batch: pa.RecordBatch | pa.Table, *, vocabulary_size: int, max_candidates: int
) -> tuple[list[Trajectory], list[BadTrajectory]]:
    """The trajectories that can be replayed, and for every other row the first thing wrong with it.

    Raises `TrajectoryError` where no row can be read: another schema version, a missing column, another K.
    """
    good: list[Trajectory] = []
    bad: list[BadTrajectory] = []
    for part in batch.to_batches() if isinstance(batch, pa.Table) else [batch]:
        parts = columns(part)
        if parts.max_candidates != max_candidates and parts.num_rows:
            raise TrajectoryError(
                f"trajectory {parts.scalars['request_id'][0]}: column candidate_ids: "
                f"{parts.max_candidates} candidates, configured are {max_candidates}"
            )
        found: dict[int, BadTrajectory] = {}
        for row, column, reason in _problems(parts, vocabulary_size):
            found.setdefault(row, BadTrajectory(str(parts.scalars["request_id"][row]), column, reason))
        good += rows(parts, [row for row in range(parts.num_rows) if row not in found])
        bad += [found[row] for row in sorted(found)]
    return good, bad


def _problems(parts: Columns, vocabulary_size: int) -> Iterator[tuple[int, str, str]]:
    """(row, column, reason), lengths first."""
    yield from _length_problems(parts)
    for row, reason in enumerate(parts.scalars["finish_reason"]):
        if reason == "cut":
            yield row, "finish_reason", "cut: the response goes on in another batch"
    for column in ("prompt_ids", "response_ids", "candidate_ids"):
        ids = parts.flat[column]
        outside = (ids < 0) | (ids >= vocabulary_size)
        yield from _at(parts, column, outside, f"id outside the vocabulary of {vocabulary_size}")
    for column in ("log_density", "noise", "weights"):
        yield from _at(parts, column, ~np.isfinite(parts.flat[column]), "NaN or infinite")
    logprobs = parts.flat["candidate_logprobs"]
    yield from _at(parts, "candidate_logprobs", ~(logprobs <= WEIGHT_SUM_TOLERANCE), "NaN or positive")
    yield from _at(parts, "censor_threshold", np.isinf(parts.flat["censor_threshold"]), "infinite")
    off = np.abs(parts.flat["weights"].sum(axis=1) - 1.0) > WEIGHT_SUM_TOLERANCE
    yield from _at(parts, "weights", off, f"do not sum to 1 within {WEIGHT_SUM_TOLERANCE}")


def _length_problems(parts: Columns) -> Iterator[tuple[int, str, str]]:
    positions = np.diff(parts.offsets["response_ids"])
    kinds, lengths = parts.flat["kind"], parts.flat["kind_length"]
    soft = sum_per_row(np.where(kinds == Kind.SOFT, lengths, 0), parts.offsets["kind_runs"])
    yield from _at(parts, "kind_runs", (kinds > max(Kind)) | (lengths <= 0), "unknown kind or empty run")
    yield from _at(parts, "version_runs", parts.flat["version_length"] <= 0, "empty run")
    wanted = {
        "kind_runs": (sum_per_row(lengths, parts.offsets["kind_runs"]), positions),
        "version_runs": (sum_per_row(parts.flat["version_length"], parts.offsets["version_runs"]), positions),
        "log_density": (np.diff(parts.offsets["log_density"]), positions),
        **{
            column: (np.diff(parts.offsets[column]), soft)
            for column in ("candidate_ids", "candidate_logprobs", "noise", "weights", "censor_threshold")
        },
    }
    for column, (found, need) in wanted.items():
        for row in np.flatnonzero(found != need):
            yield int(row), column, f"covers {found[row]} positions, need {need[row]}"


def _at(parts: Columns, column: str, wrong: np.ndarray, reason: str) -> Iterator[tuple[int, str, str]]:
    """One problem per row that holds a wrong element; `wrong` has the column's flat shape."""
    if not wrong.any():
        return
    elements = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
    found = np.unique(np.searchsorted(parts.offsets[column], elements, side="right") - 1)
    for row in found:
        if 0 <= row < parts.num_rows:
            yield int(row), column, reason
