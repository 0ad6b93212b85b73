"""The alarm on the gap between engine and learner: two views of one policy that score the same tokens (pure, no torch).

Judged are steps whose tokens all come from the weights that the step starts with: the divergence of the two views is
then rounding, and anything more is a fault of one of them (a temperature, a mask, a mixture, weights that are not those
of the version). Older tokens differ by what was learned since, so that their steps are not judged.
"""

from __future__ import annotations

from collections.abc import Mapping

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.015}
"""Largest `mismatch/kl_<part>` by type of the weights. It is half the variance of the gap: .0002 (censored likelihood,
discrete tokens) to .004 (gumbel) for bf16 logits, .005 where the two kernels round differently; below 1e-6 in fp32."""
PARTS = ("thinking", "answer")
UNJUDGED_THINKING = ("reference", "gaussian")
"""Likelihoods whose gap at soft positions is no rounding: `reference` counts the probability of filtered candidates,
which the engine's record leaves out; the density of Gaussian draws magnifies the rounding of bf16 logits."""


class MismatchWatch:
    """Feed it the metrics of every training step; it answers with a warning when a stretch of alarms begins."""

    def __init__(self, dtype: str, likelihood: str) -> None:
        self.dtype = dtype
        self._parts = tuple(part for part in PARTS if part == "answer" or likelihood not in UNJUDGED_THINKING)
        self.alarm: bool | None = None
        """Of the step seen last; None where it could not be judged."""
        self._warned = False

    def observe(self, metrics: Mapping[str, float], version: int | None) -> str | None:
        """The warning, or None. `version` names the weights that the step started with; None if they have none.

        A stretch ends with the first step that is judged and within the tolerance.
        """
        gaps = {name: metrics[name] for name in (f"mismatch/kl_{part}" for part in self._parts) if name in metrics}
        if version is None or not gaps or metrics["learner/oldest_version"] < version:
            self.alarm = None
            return None
        tolerance = TOLERANCE[self.dtype]
        # A gap that is not a number is no small one.
        large = [f"{name} {value:.4g}" for name, value in gaps.items() if not value <= tolerance]
        begins = bool(large) and not self._warned
        self.alarm = self._warned = bool(large)
        if not begins:
            return None
        return (
            f"engine and learner disagree about tokens of the same weights ({', '.join(large)}; up to {tolerance:g} is "
            f"rounding in {self.dtype}): the ratios are wrong by as much. Look for what only one of the two does: "
            "another model revision, a change of logits or temperature, weights that did not arrive"
        )
