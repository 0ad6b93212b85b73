"""When a training run evaluates its policy: before the first step, every N steps beside training, and at the end.

    step 0 --before()--> evaluations/step_000000.json --+
    step N --after_step()--> a task beside training ----+--> summary.json, best checkpoint
    last   --finish()--> evaluations/step_000040.json --+

Invariants: the first and the last evaluation see one policy version each (no training goes on); an evaluation of a step
that is already on disk is not repeated by a resumed run; an evaluation beside training never delays a step, and when
one takes longer than N steps the next is skipped and counted; the checkpoint of its step is kept until it has ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from orchestration.config import Config
from orchestration.evaluate import EvaluationResult, EvaluationSettings, Pools, evaluate
from orchestration.failures import GroupFailed
from orchestration.run_state import RunDirectory, write_atomically
from orchestration.validate import PromptSet
from rollout.full_store import StoreFull

logger = logging.getLogger(__name__)

FOLDER = "evaluations"
SUMMARY = "summary.json"
WRITING_POLL_S = 0.1
WRITING_DEADLINES = 2
"""The learner has `learner.step_timeout_s` to save its state; digests and fsync of it get as long."""


@dataclass(slots=True)
class RunEvaluation:
    """The evaluations of one training run."""

    config: Config
    prompts: tuple[PromptSet, ...]
    """`data.evaluation`, in order; the first decides which checkpoint is best."""
    pools: Pools
    directory: RunDirectory
    log: Callable[[Mapping[str, float], int], None]
    """(metrics, step), as the tracker takes them."""
    skipped: int = 0
    started: float = field(default_factory=time.monotonic)
    _beside: asyncio.Task[None] | None = None

    async def before(self) -> None:
        """Evaluate the policy that training starts from."""
        if self.config.evaluation.before_and_after:
            await self._evaluate(0)

    def after_step(self, step: int) -> None:
        """Start an evaluation beside training if one is due; returns at once."""
        every, at_end = self.config.evaluation.every_steps, self.config.evaluation.before_and_after
        if not self.prompts or not every or step % every or (at_end and step == self.config.steps):
            return
        if self._beside is not None and not self._beside.done():
            self.skipped += 1
            logger.warning("evaluation of step %d skipped: the one before is not finished", step)
            self.log({"evaluation/skipped": self.skipped}, step)
            return
        self._beside = asyncio.create_task(self._evaluate_beside(step), name=f"evaluation of step {step}")

    async def finish(self, step: int) -> None:
        """Wait for an evaluation beside training, evaluate the last policy, write the summary.

        The rollout actors must serve the last version when this is called.
        """
        if self._beside is not None:
            await self._beside
        if self.config.evaluation.before_and_after:
            await self._evaluate(step)
            if self.prompts and self.config.evaluation.every_steps:
                self._mark_best(step)
        self.write_summary(step)

    def cancel(self) -> None:
        """Drop an evaluation beside training (the run stops)."""
        if self._beside is not None:
            self._beside.cancel()

    def write_summary(self, step: int) -> None:
        """`summary.json`: the first and the last evaluation of this run, and how long this attempt took."""
        before, after = self._load(0), self._load(step)
        record = {
            "before": _overall(before),
            "after": _overall(after),
            "seconds": round(time.monotonic() - self.started, 1),
            "steps": step,
            "datasets": {name: {"before": before.get(name), "after": after.get(name)} for name in before | after},
        }
        write_atomically(self.directory.path / SUMMARY, json.dumps(record, indent=2).encode())

    async def _evaluate_beside(self, step: int) -> None:
        with self.directory.holding(step):
            try:
                await self._evaluate(step, beside_training=True)
            except (GroupFailed, StoreFull, OSError) as failure:  # a full disk costs this evaluation, not the run
                logger.error("evaluation of step %d failed: %s", step, failure)
                self.log({"evaluation/failed": 1}, step)
                return
            if await self._is_written(step):
                self._mark_best(step)

    async def _is_written(self, step: int) -> bool:
        """Wait until no checkpoint of this step is being written; False, with an error, where that takes too long."""
        seconds = WRITING_DEADLINES * self.config.learner.step_timeout_s
        deadline = time.monotonic() + seconds
        while self.directory.is_writing(step):
            if time.monotonic() > deadline:
                logger.error(
                    "the checkpoint of step %d is still being written after %.0f s (%g x learner.step_timeout_s): "
                    "whether it is the best is left open",
                    step,
                    seconds,
                    WRITING_DEADLINES,
                )
                return False
            await asyncio.sleep(WRITING_POLL_S)
        return True

    async def _evaluate(self, step: int, *, beside_training: bool = False) -> None:
        if not self.prompts or self._load(step):
            return
        results = [
            await evaluate(self.pools, prompts, self._settings(step), beside_training=beside_training)
            for prompts in self.prompts
        ]
        metrics: dict[str, float] = {}
        for result in results:
            metrics |= result.metrics()
            logger.info("evaluation of step %d on %s: %s", step, result.name, _one_line(result))
        self.log(metrics, step)
        path = self._path(step)
        path.parent.mkdir(exist_ok=True)
        summaries = {result.name: result.summary() for result in results}
        write_atomically(path, json.dumps({"step": step, "datasets": summaries, "metrics": metrics}).encode())

    def _settings(self, step: int) -> EvaluationSettings:
        evaluation = self.config.evaluation
        return EvaluationSettings(
            samples=evaluation.samples,
            thinking=self.config.sampling.thinking,
            seed=self.config.seed,
            limit=evaluation.limit,
            tag=f"step {step}",
        )

    def _mark_best(self, step: int) -> None:
        """Keep the checkpoint of this step if its Pass@1 is the best so far (there is one where both periods meet)."""
        score = self._load(step)[self.prompts[0].name]["pass@1"]
        checkpoint = self.directory.checkpoints / f"step_{step:06d}"
        best = self.directory.best()
        if best is not None and score <= best[1]:
            return
        if not checkpoint.is_dir():
            logger.info("step %d is the best so far and has no checkpoint (any more); let the periods meet", step)
            return
        self.directory.mark_best(checkpoint, score)

    def _path(self, step: int) -> Any:
        return self.directory.path / FOLDER / f"step_{step:06d}.json"

    def _load(self, step: int) -> dict[str, dict[str, float]]:
        """Summaries by dataset; empty if this step was not evaluated."""
        try:
            record = json.loads(self._path(step).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        datasets: dict[str, dict[str, float]] = record["datasets"]
        return datasets


def _overall(datasets: Mapping[str, Mapping[str, float]]) -> dict[str, float] | None:
    """Means over datasets; None without any."""
    if not datasets:
        return None
    names = next(iter(datasets.values()))
    return {name: fmean(summary[name] for summary in datasets.values()) for name in names}


def _one_line(result: EvaluationResult) -> str:
    values = "  ".join(f"{name} {value:.3f}" for name, value in result.summary().items())
    return f"{values}  ({len(result.questions)} questions x {result.settings.samples}, {result.seconds:.0f} s)"
