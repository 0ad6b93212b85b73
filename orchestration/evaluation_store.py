"""Where `softgrpo evaluate` keeps answers: a directory per result, Parquet parts, and what they were made with.

    DIR/settings.json                        what every row has in common, per arm and per benchmark
    DIR/<benchmark>/<arm>/part-000000.parquet   one row per response, written as calls finish
    DIR/results.json                         statistics, made from the rows

Invariants: rows made with different settings never share a directory; a part is complete or absent (rename); a call's
rows are in one part, so a resumed evaluation asks exactly for the calls that are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestration.config import ConfigError
from orchestration.evaluate import FinishedCall
from orchestration.run_state import write_atomically
from rollout.trajectory import Kind, Trajectory, unpack

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
SETTINGS = "settings.json"
FLUSH_ROWS = 512
FLUSH_SECONDS = 30.0
FETCH_DEADLINE_S = 120.0
TRACE_COLUMNS = ("response_ids", "kind_runs", "candidate_ids", "candidate_logprobs", "noise", "weights")
"""What a trajectory browser draws; the bulk of a response, kept for the first samples of a question only."""
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@=+-]*")

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredSample:
    """One response as statistics need it."""

    sample_index: int
    verdict: str
    extracted: str | None
    length: int
    soft_length: int
    truncated: bool
    entropy: float | None
    """Mean over its soft positions of the entropy of the retained candidates, nats; None without soft positions."""
    top_weight: float | None
    active: float | None
    """Mean number of candidates in the executed mixture."""
    trace: str
    """Digest of the emitted thinking tokens."""

    @property
    def correct(self) -> bool:
        """Whether the verifier accepted it."""
        return self.verdict == "correct"


class ResultDirectory:
    """One evaluation result on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, shared: Settings, arms: Mapping[str, Settings], benchmarks: Mapping[str, Settings]) -> None:
        """Create the directory, or join one that was made with the same settings (new arms and benchmarks are added).

        Raises `ConfigError` naming the first setting that differs.
        """
        for name in (*arms, *benchmarks):
            if not SAFE_NAME.fullmatch(name):
                raise ConfigError(f"{name!r}: names of arms and benchmarks are letters, digits and any of . _ @ = + -")
        known = self.settings() if (self.path / SETTINGS).is_file() else None
        merged: Settings = {"format_version": FORMAT_VERSION, "shared": shared, "arms": {}, "benchmarks": {}}
        if known is not None:
            self._refuse_difference("", {"format_version": known["format_version"]}, {"format_version": FORMAT_VERSION})
            self._refuse_difference("", known["shared"], shared)
            for part, new in (("arms", arms), ("benchmarks", benchmarks)):
                for name in known[part].keys() & new.keys():
                    self._refuse_difference(f"{part[:-1]} {name}: ", known[part][name], new[name])
                merged[part] = dict(known[part])
        merged["arms"] |= arms
        merged["benchmarks"] |= benchmarks
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / SETTINGS, json.dumps(merged, indent=2).encode())

    def settings(self) -> Settings:
        """What the rows were made with; raises `ConfigError` where there is no result."""
        try:
            settings: Settings = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{self.path}: no evaluation result there (no {SETTINGS})") from None
        return settings

    def parts(self, benchmark: str, arm: str) -> list[Path]:
        """The Parquet files of one arm on one benchmark, in the order of writing."""
        return sorted((self.path / benchmark / arm).glob("part-*.parquet"))

    def done(self, benchmark: str, arm: str) -> set[tuple[str, int]]:
        """(prompt id, sample index) of every stored response."""
        done: set[tuple[str, int]] = set()
        for part in self.parts(benchmark, arm):
            table = pq.read_table(part, columns=["prompt_id", "sample_index"])
            done |= set(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
        return done

    def samples(self, benchmark: str, arm: str) -> dict[str, list[StoredSample]]:
        """Samples by question, in the order of their index."""
        names = [name for name in StoredSample.__dataclass_fields__ if name != "truncated"]
        questions: dict[str, list[StoredSample]] = {}
        for part in self.parts(benchmark, arm):
            for record in pq.read_table(part, columns=[*names, "prompt_id", "finish_reason"]).to_pylist():
                truncated = record.pop("finish_reason") == "length"
                questions.setdefault(record.pop("prompt_id"), []).append(StoredSample(truncated=truncated, **record))
        return {name: sorted(found, key=lambda s: s.sample_index) for name, found in sorted(questions.items())}

    def _refuse_difference(self, where: str, old: Settings, new: Settings) -> None:
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise ConfigError(
                    f"{self.path}: {where}{key} was {old.get(key)!r} and is now {new.get(key)!r}; one result holds one "
                    "setting: give another --output, or the setting it was made with"
                )


@dataclass(slots=True)
class PartWriter:
    """Writes the calls of one arm on one benchmark; use as an asynchronous hook, then `close`."""

    directory: Path
    keep_traces: int
    """Samples per question whose whole soft trace is kept."""
    end_of_thinking_id: int | None
    _tables: list[pa.Table] = field(default_factory=list)
    _rows: int = 0
    _next_part: int = 0
    _flushed_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for torn in self.directory.glob(".part-*"):
            torn.unlink()
        existing = sorted(self.directory.glob("part-*.parquet"))
        self._next_part = int(existing[-1].stem.removeprefix("part-")) + 1 if existing else 0

    def add(self, call: FinishedCall, batch: pa.RecordBatch) -> None:
        """Take over one finished call; its rows are on disk after the next flush."""
        self._tables.append(call_table(call, batch, self.keep_traces, self.end_of_thinking_id))
        self._rows += batch.num_rows
        if self._rows >= FLUSH_ROWS or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added as one part."""
        if self._tables:
            final = self.directory / f"part-{self._next_part:06d}.parquet"
            aside = final.with_name(f".{final.name}")
            pq.write_table(pa.concat_tables(self._tables), aside, compression="zstd")
            os.replace(aside, final)
            self._next_part += 1
        self._tables, self._rows, self._flushed_at = [], 0, time.monotonic()


def call_table(call: FinishedCall, batch: pa.RecordBatch, keep_traces: int, end_of_thinking_id: int | None) -> pa.Table:
    """The rows of one call: what was asked, answered and graded, and the whole trace of the first samples."""
    trajectories = unpack(batch)
    grades = dict(zip(call.summary.request_ids, call.grades, strict=True))
    ordered = [grades[trajectory.request_id] for trajectory in trajectories]
    kept = [row if t.sample_index < keep_traces else None for row, t in enumerate(trajectories)]
    columns: dict[str, pa.Array] = {
        name: batch.column(name)
        for name in ("prompt_id", "sample_index", "seed", "finish_reason", "response_text", "answer_text")
    }
    columns |= {
        "data_source": pa.array([call.row.data_source] * batch.num_rows),
        "question": pa.array([call.row.messages[-1]["content"]] * batch.num_rows),
        "gold": pa.array([_text(call.row.gold)] * batch.num_rows),
        "verdict": pa.array([grade.verdict.value for grade in ordered]),
        "reward": pa.array([float(grade.reward) for grade in ordered]),
        "extracted": pa.array([grade.extracted for grade in ordered], pa.string()),
        "grade_detail": pa.array([grade.detail for grade in ordered]),
        "grade_s": pa.array([float(grade.seconds) for grade in ordered]),
        "policy_version": pa.array([int(t.versions.max(initial=0)) for t in trajectories], pa.int64()),
        "trace": pa.array([_trace_digest(trajectory, end_of_thinking_id) for trajectory in trajectories]),
    }
    thinking = [_thinking_numbers(trajectory) for trajectory in trajectories]
    columns |= {
        "length": pa.array([len(t.response_ids) for t in trajectories], pa.int32()),
        "soft_length": pa.array([len(t.weights) for t in trajectories], pa.int32()),
        **{
            name: pa.array([None if numbers is None else numbers[name] for numbers in thinking], pa.float64())
            for name in ("entropy", "top_weight", "active")
        },
    }
    columns |= {name: batch.column(name).take(pa.array(kept, pa.int32())) for name in TRACE_COLUMNS}
    return pa.table(columns)


def _thinking_numbers(trajectory: Trajectory) -> dict[str, float] | None:
    if not len(trajectory.weights):
        return None
    log_p = trajectory.candidate_logprobs.astype(np.float64)
    entropy = -np.where(np.isfinite(log_p), np.exp(log_p) * np.where(np.isfinite(log_p), log_p, 0.0), 0.0).sum(axis=1)
    return {
        "entropy": float(entropy.mean()),
        "top_weight": float(trajectory.weights.max(axis=1).mean()),
        "active": float((trajectory.weights > 0).sum(axis=1).mean()),
    }


def _trace_digest(trajectory: Trajectory, end_of_thinking_id: int | None) -> str:
    """Two responses have equal traces if they emitted the same tokens up to the end of thinking."""
    ids = trajectory.response_ids
    closed = (trajectory.kinds == Kind.ENDED) | (trajectory.kinds == Kind.FORCED)
    if not closed.any() and not len(trajectory.weights):
        closed = ids == end_of_thinking_id  # a discrete response marks the end of its thinking by the token only
    end = int(np.argmax(closed)) if np.any(closed) else len(ids)
    return hashlib.blake2b(ids[:end].tobytes(), digest_size=8).hexdigest()


def _text(gold: Any) -> str:
    return gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False, sort_keys=True)


def missing_calls(
    calls: Sequence[tuple[Any, tuple[Any, ...]]], done: set[tuple[str, int]]
) -> list[tuple[Any, tuple[Any, ...]]]:
    """The calls of which not every sample is stored."""
    return [
        (row, requests)
        for row, requests in calls
        if any((row.prompt_id, request.sample_index) not in done for request in requests)
    ]
