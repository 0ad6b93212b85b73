"""One line of a benchmark: a ratio measured side by side in one run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """`ok` is ratio >= target; rows whose peer is missing are left out with a message, never invented."""

    name: str
    """`benchmark/case`"""
    ratio: float
    target: float
    detail: str
    """Medians, intervals, correctness gate and the analytic floor, for humans."""
    at_most: bool = False
    """The target is an upper bound."""

    @property
    def ok(self) -> bool:
        """Whether the target is met."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target
