"""Mathematical answers: extraction and comparison by math-verify."""

from __future__ import annotations

from reward.verdict import Verdict


def grade(answer: str, gold: str) -> Verdict:
    """Compare a response with a gold answer in this process, without any time limit (the sandbox supplies it)."""
    raise NotImplementedError
