"""Trajectories: the versioned Arrow batch that rollout actors return and learners replay.

One row is one response. Per soft position: K candidate ids, behaviour log-probs, noise and weights, never bf16
(weights shift by up to .13). Position kinds and policy versions are run lengths, never inferred from a token id.

    engine -> Trajectory (numpy) --pack--> pa.RecordBatch --object store--> unpack -> Trajectory (read-only views)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1
DEFAULT_MAX_CANDIDATES = 5


class Kind(IntEnum):
    """What one response position is."""

    DISCRETE = 0
    """An ordinary token, sampled with the answer settings."""
    SOFT = 1
    """A mixture; the emitted token is its heaviest candidate."""
    ENDED = 2
    """The end-of-thinking token, drawn from the thinking distribution; fed as an ordinary token."""
    FORCED = 3
    """The end-of-thinking token put there by the budget: no action of the policy, never in the loss."""


class TrajectoryError(ValueError):
    """A batch or a row that cannot be replayed; the message names the trajectory and the column."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One response of T positions, S of them soft, with K candidates each."""

    request_id: str
    group_id: str
    prompt_id: str
    sample_index: int
    seed: int
    prompt_ids: np.ndarray
    """[P] int32"""
    response_ids: np.ndarray
    """[T] int32 emitted tokens"""
    kinds: np.ndarray
    """[T] uint8, values of `Kind`"""
    versions: np.ndarray
    """[T] int64, the policy version each position was sampled under"""
    log_density: np.ndarray
    """[T] fp32 behaviour log-density: at soft positions that of the drawn noise under its own family, summed over the
    retained candidates, whatever the likelihood; elsewhere the full-vocabulary log-probability of the emitted token at
    its own temperature; 0 at forced positions"""
    candidate_ids: np.ndarray
    """[S, K] int32"""
    candidate_logprobs: np.ndarray
    """[S, K] fp32, -inf where filtered out"""
    noise: np.ndarray
    """[S, K] fp32"""
    weights: np.ndarray
    """[S, K] fp32, 0 where filtered out or censored"""
    censor_threshold: np.ndarray
    """[S] fp32, NaN where the mixture was not censored"""
    finish_reason: str
    """stop | length; cut: stopped at a step boundary, to go on elsewhere (never trained)"""
    response_text: str
    """The response without special tokens, for verifiers and reports."""
    answer_text: str
    """The part of `response_text` after the end of thinking; empty if thinking never ended."""


def schema_for(max_candidates: int) -> pa.Schema:
    """The trajectory schema for K = `max_candidates`; its version is in the metadata."""
    per_soft = pa.list_(pa.list_(pa.float32(), max_candidates))
    fields = [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field(
            "kind_runs",
            pa.list_(pa.struct([("kind", pa.uint8()), ("length", pa.int32())])),
            nullable=False,
        ),
        pa.field(
            "version_runs",
            pa.list_(pa.struct([("version", pa.int64()), ("length", pa.int32())])),
            nullable=False,
        ),
        pa.field("log_density", pa.list_(pa.float32()), nullable=False),
        pa.field("candidate_ids", pa.list_(pa.list_(pa.int32(), max_candidates)), nullable=False),
        pa.field("candidate_logprobs", per_soft, nullable=False),
        pa.field("noise", per_soft, nullable=False),
        pa.field("weights", per_soft, nullable=False),
        pa.field("censor_threshold", pa.list_(pa.float32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),
        pa.field("answer_text", pa.string(), nullable=False),
    ]
    metadata = {
        "softgrpo.schema_version": str(SCHEMA_VERSION),
        "softgrpo.max_candidates": str(max_candidates),
    }
    return pa.schema(fields, metadata=metadata)


SCHEMA = schema_for(DEFAULT_MAX_CANDIDATES)


_PER_POSITION = ("kinds", "versions", "log_density")
_PER_SOFT_POSITION = ("candidate_ids", "candidate_logprobs", "noise", "weights", "censor_threshold")


def pack(trajectories: Sequence[Trajectory], max_candidates: int = DEFAULT_MAX_CANDIDATES) -> pa.RecordBatch:
    """Put trajectories into one record batch (one copy of every array).

    Raises `TrajectoryError` if an array's length or K does not fit its row.
    """
    schema = schema_for(max_candidates)
    values = {name: [getattr(t, name) for t in trajectories] for name in Trajectory.__dataclass_fields__}
    positions = np.array([len(ids) for ids in values["response_ids"]], np.int64)
    for column in _PER_POSITION:
        _check_shapes(values, column, positions, ())
    kinds = _find_runs(values["kinds"], positions, np.dtype(np.uint8))
    versions = _find_runs(values["versions"], positions, np.dtype(np.int64))
    soft = sum_per_row(np.where(kinds[0] == Kind.SOFT, kinds[1], 0), kinds[2])
    for column in _PER_SOFT_POSITION:
        _check_shapes(values, column, soft, () if column == "censor_threshold" else (max_candidates,))
    arrays = []
    for field in schema:
        if field.name == "kind_runs":
            arrays.append(_pack_runs("kind", *kinds))
        elif field.name == "version_runs":
            arrays.append(_pack_runs("version", *versions))
        elif pa.types.is_list(field.type):
            arrays.append(_pack_list(values[field.name], field.type))
        else:
            arrays.append(pa.array(values[field.name], field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _check_shapes(values: dict[str, list[Any]], column: str, lengths: np.ndarray, inner: tuple[int, ...]) -> None:
    """Raise unless array r of a column has shape (lengths[r], *inner)."""
    for row, (array, length) in enumerate(zip(values[column], lengths.tolist(), strict=True)):
        if array.shape != (length, *inner):
            raise TrajectoryError(
                f"trajectory {values['request_id'][row]}: column {column}: shape {array.shape}, "
                f"need {(length, *inner)} for its positions, soft positions and candidates"
            )


def sum_per_row(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[B] int64 sums of the list elements `values` of each row."""
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return total[offsets[1:]] - total[offsets[:-1]]


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """[B + 1] int32 list offsets; a batch holds fewer than 2^31 elements per column."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise TrajectoryError(f"{offsets[-1]} elements in one column: split the batch (limit 2^31 - 1)")
    return offsets.astype(np.int32)


def _flat(arrays: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """All elements in one fresh 1-D array.

    It lies in Arrow's memory pool, which keeps freed pages: taking new ones from the system costs more than the copy.
    """
    buffer = pa.allocate_buffer(sum(array.size for array in arrays) * dtype.itemsize)
    flat = np.frombuffer(buffer, dtype)
    if arrays:
        np.concatenate([array.reshape(-1) for array in arrays], out=flat, casting="same_kind")
    return flat


def _pack_list(arrays: Sequence[np.ndarray], kind: pa.ListType) -> pa.ListArray:
    """A list column, of numbers or of fixed-size lists of numbers."""
    inner = kind.value_type
    fixed = pa.types.is_fixed_size_list(inner)
    values = pa.array(_flat(arrays, np.dtype((inner.value_type if fixed else inner).to_pandas_dtype())))
    if fixed:
        values = pa.FixedSizeListArray.from_arrays(values, type=inner)
    return pa.ListArray.from_arrays(pa.array(_offsets([len(array) for array in arrays])), values, type=kind)


Runs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Value and length of every run of a batch, and the [B + 1] offsets of the rows' runs."""


def _find_runs(rows: Sequence[np.ndarray], lengths: np.ndarray, dtype: np.dtype) -> Runs:
    """Stretches of equal neighbours, found with one comparison over the batch; a row's first element starts one."""
    values = _flat(rows, dtype)
    starts_here = np.empty(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=starts_here[1:])
    starts_here[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    starts = np.flatnonzero(starts_here)
    run_lengths = np.diff(starts, append=len(values)).astype(np.int32)
    offsets = np.concatenate([[0], np.searchsorted(starts, np.cumsum(lengths))]).astype(np.int32)
    return values[starts], run_lengths, offsets


def _pack_runs(name: str, values: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    """A column of runs {name, length}."""
    structs = pa.StructArray.from_arrays([pa.array(values), pa.array(lengths)], names=[name, "length"])
    return pa.ListArray.from_arrays(pa.array(offsets), structs)


@dataclass(frozen=True, slots=True)
class Columns:
    """A batch as flat read-only views, the layout of a packed micro-batch: row r is `[offsets[r]:offsets[r + 1]]`.

    `flat[name]` is 1-D, or [total, K] for candidate columns; `flat["kind"]`, `flat["version"]` and
    `flat["kind_length"]`, `flat["version_length"]` are the runs, under the offsets of `kind_runs` and `version_runs`.
    """

    num_rows: int
    max_candidates: int
    flat: dict[str, np.ndarray]
    offsets: dict[str, np.ndarray]
    scalars: dict[str, list[str] | list[int]]


def columns(batch: pa.RecordBatch) -> Columns:
    """Flat views of every column; raises `TrajectoryError` for a schema that is not ours."""
    max_candidates = check_schema(batch.schema)
    flat: dict[str, np.ndarray] = {}
    offsets: dict[str, np.ndarray] = {}
    scalars: dict[str, list[str] | list[int]] = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        _refuse_nulls(field.name, column)
        if not pa.types.is_list(field.type):
            scalars[field.name] = column.to_pylist()
            continue
        offsets[field.name] = column.offsets.to_numpy()
        values = column.values
        _refuse_nulls(field.name, values)
        if pa.types.is_struct(field.type.value_type):
            name = field.name.removesuffix("_runs")
            flat[name], flat[f"{name}_length"] = (part.to_numpy() for part in values.flatten())
        elif pa.types.is_fixed_size_list(field.type.value_type):
            inner = values.flatten()
            _refuse_nulls(field.name, inner)
            flat[field.name] = inner.to_numpy().reshape(-1, max_candidates)
        else:
            flat[field.name] = values.to_numpy()
    return Columns(batch.num_rows, max_candidates, flat, offsets, scalars)


def check_schema(schema: pa.Schema) -> int:
    """K of a batch of ours; raises `TrajectoryError` naming the version or the column that does not fit."""
    metadata = schema.metadata or {}
    version = metadata.get(b"softgrpo.schema_version", b"absent").decode()
    if version != str(SCHEMA_VERSION):
        raise TrajectoryError(f"trajectory schema version {version}, this code reads {SCHEMA_VERSION}")
    max_candidates = int(metadata.get(b"softgrpo.max_candidates", b"0"))
    wanted = schema_for(max_candidates) if max_candidates > 0 else SCHEMA
    for field in wanted:
        position = schema.get_field_index(field.name)
        found = schema.field(position).type if position >= 0 else "absent"
        if found != field.type:
            raise TrajectoryError(f"trajectory batch: column {field.name}: {found}, need {field.type}")
    return max_candidates


def _refuse_nulls(name: str, array: pa.Array) -> None:
    if array.null_count:
        raise TrajectoryError(f"trajectory batch: column {name}: {array.null_count} nulls")


def unpack(batch: pa.RecordBatch | pa.Table) -> list[Trajectory]:
    """The trajectories of a batch as read-only numpy views of its buffers (run lengths are expanded).

    Raises `TrajectoryError` if the schema or its version is not ours.
    """
    batches = batch.to_batches() if isinstance(batch, pa.Table) else [batch]
    return [trajectory for part in batches for trajectory in rows(columns(part))]


def rows(parts: Columns, keep: Sequence[int] | None = None) -> list[Trajectory]:
    """The rows `keep` (all if None) of flat columns as trajectories."""
    array_columns = [name for name in parts.offsets if not name.endswith("_runs")]
    found = []
    for row in range(parts.num_rows) if keep is None else keep:
        values: dict[str, object] = {name: column[row] for name, column in parts.scalars.items()}
        for name in array_columns:
            start, end = parts.offsets[name][row : row + 2]
            values[name] = parts.flat[name][start:end]
        values["kinds"] = _expand_runs(parts, "kind", row)
        values["versions"] = _expand_runs(parts, "version", row)
        found.append(Trajectory(**values))  # type: ignore[arg-type]
    return found


def _expand_runs(parts: Columns, name: str, row: int) -> np.ndarray:
    """The read-only array that a row's runs stand for; a single run is a zero-stride view of one number."""
    start, end = parts.offsets[f"{name}_runs"][row : row + 2]
    values, lengths = parts.flat[name][start:end], parts.flat[f"{name}_length"][start:end]
    if len(values) == 1:
        return np.broadcast_to(values[0], (int(lengths[0]),))
    array = np.repeat(values, lengths)
    array.flags.writeable = False
    return array
