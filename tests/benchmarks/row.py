"""One line of a benchmark: a ratio measured side by side in one run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """`ok` is a right result and ratio >= target.

    Rows whose peer is missing are left out with a message, never invented.
    """

    name: str
    """`benchmark/case`"""
    ratio: float
    target: float
    detail: str
    """Medians, intervals, correctness gate and the analytic floor, for humans."""
    at_most: bool = False
    """The target is an upper bound."""
    right: bool = True
    """The correctness gate."""

    @property
    def ok(self) -> bool:
        """Whether the target is met by something that works."""
        return self.right and (self.ratio <= self.target if self.at_most else self.ratio >= self.target)
