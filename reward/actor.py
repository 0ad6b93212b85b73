"""The Ray actor around a verifier: reads three text columns of a trajectory batch, returns grades.

Children do the work, so the actor may serve several calls at once (`max_concurrency`): one group with a bomb in it
does not hold up the others.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from reward.extraction import Answer
from reward.rules import Gold
from reward.verdict import Grade
from reward.verifier import Verifier, VerifierSpec

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["VerifierActor", "VerifierSpec"]


class VerifierActor:
    """Wrap with `ray.remote`; the pool decides on resources."""

    def __init__(self, spec: VerifierSpec) -> None:
        self._verifier = Verifier(spec)

    def ready(self) -> dict[str, Any]:
        """Where it runs and how programs are isolated; children can be forked (the constructor waits for that)."""
        return {"pid": os.getpid(), "node": os.uname().nodename, "program_isolation": self._verifier.isolation}

    def score(self, batch: pa.RecordBatch, gold: Gold, rule: str) -> list[Grade]:
        """One grade per row, in row order; all rows answer the same question."""
        answers = answers_of(batch)
        return self._verifier.score(answers, [gold] * len(answers), [rule] * len(answers))

    def audit(self, golds: list[Gold], rules: list[str]) -> list[str | None]:
        """Why each gold value cannot be used with its rule; None where it can."""
        return self._verifier.audit(golds, rules)

    def stats(self) -> dict[str, float]:
        """Counters since the start."""
        return self._verifier.stats()


def answers_of(batch: pa.RecordBatch) -> list[Answer]:
    """What rules may see of each row; token counts come from the offsets of `response_ids` where there are any."""
    texts = [batch.column(name).to_pylist() for name in ("response_text", "answer_text", "finish_reason")]
    lengths: list[int | None] = [None] * batch.num_rows
    if "response_ids" in batch.schema.names:
        lengths = batch.column("response_ids").value_lengths().to_pylist()
    return [Answer(*row) for row in zip(*texts, lengths, strict=True)]
