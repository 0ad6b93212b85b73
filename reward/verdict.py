"""What a verifier says of one answer: a failure is a verdict of its own, never a silent 0."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """The outcome of grading one answer."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    UNPARSEABLE = "unparseable"
    """No answer could be extracted or parsed."""
    TIMEOUT = "timeout"
    """The grader did not return within its deadline and was killed."""
    OUT_OF_MEMORY = "out_of_memory"
    CRASH = "crash"
    """The grader died or raised; `detail` says how."""

    @property
    def is_failure(self) -> bool:
        """True where the grader failed, as opposed to the answer."""
        return self in (Verdict.TIMEOUT, Verdict.OUT_OF_MEMORY, Verdict.CRASH)


@dataclass(frozen=True, slots=True)
class Grade:
    """One graded answer."""

    verdict: Verdict
    reward: float
    extracted: str | None = None
    """The answer as extracted, if there was one."""
    seconds: float = 0.0
    detail: str = ""
    """What failed, for humans."""
