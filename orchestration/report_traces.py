"""Trajectories for the report's browser: from Parquet rows to plain values that a page can draw.

Reads the samples that training saves (`trajectories/step_*.parquet`) and the rows of `softgrpo evaluate`. A position is
[kind, token, candidates]; a candidate is [token, weight, probability]. Long responses keep their beginning and end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rollout.trajectory import Kind

MAX_POSITIONS = 600
MAX_TEXT = 4000
KIND_NAMES = {Kind.DISCRETE: "token", Kind.SOFT: "soft", Kind.ENDED: "ended", Kind.FORCED: "forced"}

TokenText = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class TraceSource:
    """One Parquet file and how the browser names it."""

    label: str
    path: Path


def read_traces(sources: Sequence[TraceSource], token_text: TokenText, limit: int) -> list[dict[str, Any]]:
    """At most `limit` responses with their soft trace, taken evenly from the sources, the first and last among them."""
    if len(sources) > limit:
        sources = [sources[i * (len(sources) - 1) // max(1, limit - 1)] for i in range(limit)]
    rows_per_source = [_rows_with_trace(source.path) for source in sources]
    traces = []
    share = max(1, limit // max(1, len(sources)))
    for source, rows in zip(sources, rows_per_source, strict=True):
        traces += [_trace(source.label, row, token_text) for row in rows[:share]]
    return traces


def token_texts(model_dir: Path) -> TokenText:
    """Token id -> text of one token, by the checkpoint's tokenizer; ids in brackets where it is gone."""
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        return lambda token: f"[{token}]"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))

    def text(token: int) -> str:
        # Alone, byte pieces decode to a replacement character: their vocabulary entry says more.
        decoded = str(tokenizer.decode([token], skip_special_tokens=False))
        return decoded if decoded and "\ufffd" not in decoded else str(tokenizer.id_to_token(token) or f"[{token}]")

    return text


def _rows_with_trace(path: Path) -> list[dict[str, Any]]:
    wanted = [
        *("question", "gold", "verdict", "reward", "answer_text", "response_text", "finish_reason", "sample_index"),
        *("response_ids", "kind_runs", "version_runs", "candidate_ids", "candidate_logprobs", "weights", "extracted"),
    ]
    present = set(pq.read_schema(path).names)
    rows: list[dict[str, Any]] = pq.read_table(path, columns=[name for name in wanted if name in present]).to_pylist()
    return [row for row in rows if row.get("weights") is not None]


def _trace(label: str, row: dict[str, Any], token_text: TokenText) -> dict[str, Any]:
    kinds = [Kind(run["kind"]) for run in row["kind_runs"] for _ in range(run["length"])]
    positions: list[list[Any]] = []
    soft = 0
    for kind, token in zip(kinds, row["response_ids"], strict=True):
        candidates: list[list[Any]] = []
        if kind is Kind.SOFT:
            candidates = _candidates(row, soft, token_text)
            soft += 1
        positions.append([KIND_NAMES[kind], token_text(token), candidates])
    left_out = max(0, len(positions) - MAX_POSITIONS)
    if left_out:
        half = MAX_POSITIONS // 2
        positions = [*positions[:half], ["gap", f"{left_out} positions left out", []], *positions[-half:]]
    return {
        "source": label,
        "question": _shorten(row["question"]),
        "gold": _shorten(row["gold"]),
        "answer": _shorten(row["answer_text"] or row["response_text"]),
        "verdict": row["verdict"],
        "reward": row["reward"],
        "sample": row["sample_index"],
        "length": len(kinds),
        "soft": soft,
        "cut": row["finish_reason"] == "length",
        "positions": positions,
    }


def _candidates(row: dict[str, Any], index: int, token_text: TokenText) -> list[list[Any]]:
    """Retained candidates by descending weight: the executed ones, then those that the noise or the cut removed."""
    columns = zip(row["candidate_ids"][index], row["weights"][index], row["candidate_logprobs"][index], strict=True)
    found = [
        [token_text(token), round(weight, 4), round(math.exp(log_p), 4)]
        for token, weight, log_p in columns
        if weight > 0 or log_p > -math.inf
    ]
    return sorted(found, key=lambda candidate: (-candidate[1], -candidate[2]))


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT // 2] + " [...] " + text[-MAX_TEXT // 2 :]
