"""One learner rank without Ray: DeepSpeed engine, reference policy, the training step, weights out and state to disk.

    groups -> plan -> [old, reference scores] -> per mini-batch: passes forward/backward -> one optimiser step

All methods are collective: every rank calls them with the same arguments. The loss of a pass is the local part of the
mini-batch's loss; DeepSpeed averages gradients over ranks, so it is given `world_size` times that part.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.checkpoint import Writes, check_loadable, load_state, needs_conversion, read_facts, save_state
from learner.diagnostics import Statistics
from learner.export import export_checkpoint, named_weights, save_weights, whole
from learner.model import PolicyModel, load_policy
from learner.objective import KeptStates, ObjectiveSettings, objective, score_positions
from learner.optimizer import build_optimizer, deepspeed_config, effective_zero_stage, learning_rate
from learner.packing import ReplayBatch, ScoredLogits
from learner.replay import plan_step, rank_batches
from learner.spec import LearnerError, LearnerSpec, NonFiniteGradients, ReplayError, ScoredGroup
from learner.step_report import OptimizerStep, step_metrics

logger = logging.getLogger(__name__)

REFERENCE = "reference.safetensors"
MAX_REFUSED_IN_A_ROW = 3
"""Batches that trained nothing, one after another, before the fault is looked for in the policy instead of in them."""


class Trainer:
    """The policy on one rank; `steps` is the number of training steps it has seen."""

    def __init__(self, spec: LearnerSpec, rank: int, checkpoint: Path | None = None) -> None:
        self.spec = spec
        self.rank = rank
        self.steps = 0
        self.refused_in_a_row = 0
        self.settings = objective_settings(spec)
        initialize_distributed(spec)
        torch.manual_seed(spec.seed)
        facts = None if checkpoint is None else read_facts(checkpoint)
        convert = facts is not None and needs_conversion(facts, spec.world_size)
        self.engine = _initialize(load_policy(spec), spec, load_universal=convert)
        self.policy: PolicyModel = self.engine.module
        self.reference = self._load_reference()
        if checkpoint is not None and facts is not None:
            check_loadable(facts, effective_zero_stage(spec), checkpoint)
            load_state(self.engine, checkpoint, convert=convert, rank=rank)
            self._load_refreshed_reference(checkpoint)
            self.steps = int(facts["steps"])

    def describe(self) -> dict[str, Any]:
        """Facts for the driver's log."""
        counted = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.policy.parameters()]
        return {
            "steps": self.steps,
            "zero_stage": effective_zero_stage(self.spec),
            "num_parameters": sum(count for count, _ in counted),
            "num_trainable": sum(count for count, trainable in counted if trainable),
        }

    @property
    def _clips_against_engine(self) -> bool:
        return self.spec.old_log_density == "behaviour"

    def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        """Training step number `step` (from 0) on resolved groups; the same metrics on every rank.

        Raises, on every rank: `ReplayError` for a batch that trains nothing (the weights are as before, the step is not
        counted), and `LearnerError` before one more batch where too many in a row did not.
        """
        if step != self.steps:
            raise LearnerError(f"asked to train step {step}, the learner is at step {self.steps}")
        if self.refused_in_a_row >= MAX_REFUSED_IN_A_ROW:
            raise LearnerError(
                f"step {step}: {self.refused_in_a_row} batches in a row trained nothing; see their messages"
            )
        try:
            metrics = self._train(groups, step)
        except ReplayError:
            self.refused_in_a_row += 1
            raise
        self.refused_in_a_row = 0
        return metrics

    def _train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        started = time.perf_counter()
        plan = plan_step(groups, self.spec, self.policy.inputs.vocab_size)
        mini_batches = [rank_batches(samples, self.spec, self.rank) for samples in plan.mini_batches]
        planned = time.perf_counter()
        mini_batches = self._score(mini_batches)
        scored = time.perf_counter()
        rate = learning_rate(self.spec, step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        steps = [self._update(batches) for _ in range(self.spec.epochs) for batches in mini_batches]
        if all(update.skipped for update in steps):
            raise NonFiniteGradients(f"step {step}: gradients of all {len(steps)} mini-batches are not finite")
        self.steps += 1
        refresh = self.spec.kl_refresh_every if self.reference is not None else None
        if refresh and self.steps % refresh == 0:
            self._refresh_reference(named_weights(self.policy))
        finished = time.perf_counter()
        times = {
            "learner/step_s": finished - started,
            "learner/plan_s": planned - started,
            "learner/score_s": scored - planned,
            "learner/update_s": finished - scored,
        }
        return {
            **plan.metrics,
            **step_metrics(steps, times, mismatch_from_first=self._clips_against_engine, device=self.spec.device),
            "learner/lr": rate,
            "learner/tokens_per_s": plan.metrics["learner/tokens"] / times["learner/step_s"],
        }

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights by their Hugging Face names."""
        return named_weights(self.policy)

    def save(self, directory: Path) -> dict[str, int]:
        """Write the resumable state below `directory`; the files of this rank, by relative path, and their bytes.

        Raises `CheckpointNotWritten` on every rank if one cannot.
        """
        writes = Writes()
        facts = {"world_size": self.spec.world_size, **self.describe()}
        if self.spec.kl_refresh_every and self.reference is not None:
            with writes.attempt():
                directory.mkdir(parents=True, exist_ok=True)
            with writes.attempt():
                save_weights(named_weights(_module(self.reference)), directory / REFERENCE, writes=self.rank == 0)
                if self.rank == 0:
                    writes.wrote(directory / REFERENCE)
        save_state(self.engine, directory, facts, self.rank, writes)
        return writes.sizes(directory)

    def export(self, directory: Path) -> None:
        """Write a Hugging Face checkpoint into `directory`."""
        export_checkpoint(self.policy, self.spec.model_path, directory, writes=self.rank == 0)

    def _score(self, mini_batches: list[list[ReplayBatch]]) -> list[list[ReplayBatch]]:
        """Add the scores of the policy before this step, and of the reference policy, where the objective needs them.

        The first mini-batch of a single epoch needs no old scores: its policy *is* the old one, its ratio exactly 1.
        """
        scored = []
        for number, batches in enumerate(mini_batches):
            changed = not self._clips_against_engine and (number > 0 or self.spec.epochs > 1)
            old = [self._scores(self.engine, batch) if changed else None for batch in batches]
            reference = [self._reference_scores(batch) for batch in batches]
            scored.append([replace(b, old=o, reference=r) for b, o, r in zip(batches, old, reference, strict=True)])
        return scored

    def _scores(self, model: Any, batch: ReplayBatch, keep: KeptStates = "none") -> ScoredLogits:
        batch = batch.to(self.spec.device)
        with torch.no_grad():
            scores: ScoredLogits = model(batch, partial(_score_batch, batch=batch, keep=keep))
        return scores.to("cpu")

    def _reference_scores(self, batch: ReplayBatch) -> ScoredLogits | None:
        if not self.settings.needs_reference:
            return None
        keep = self.settings.keeps_states
        if self.reference is not None:
            return self._scores(self.reference, batch, keep)
        # The base of low-rank adapters is the reference: no second copy.
        with self.policy.language_model.disable_adapter():
            return self._scores(self.engine, batch, keep)

    def _update(self, batches: Sequence[ReplayBatch]) -> OptimizerStep:
        """One optimiser step on this rank's share of a mini-batch."""
        report = OptimizerStep(self.spec.device)
        for batch in batches:
            with report.measured_pass(), self._reference_head() as reference_weight:
                moved = batch.to(self.spec.device)
                score = partial(_objective, batch=moved, settings=self.settings, reference_weight=reference_weight)
                loss, statistics = self.engine(moved, score)
                self.engine.backward(loss * self.spec.world_size, scale_wrt_gas=False)
            if batch.weights.any():
                report.statistics.append(statistics)
        self.engine.step()
        report.grad_norm = float(self.engine.get_global_grad_norm())
        report.skipped = bool(self.engine.optimizer.overflow)
        if report.skipped:
            logger.warning("rank %d: gradients of step %d are not finite, step skipped", self.rank, self.steps)
        return report

    @contextmanager
    def _reference_head(self) -> Iterator[Tensor | None]:
        """The reference's output matrix, whole, while the exact full-vocabulary KL needs it (also backward)."""
        if self.settings.keeps_states == "none":
            yield None
            return
        head = _module(self.engine if self.reference is None else self.reference).head.weight
        with whole([head]):
            yield head

    def _load_reference(self) -> Any:
        """The frozen starting point, partitioned like the policy under ZeRO-3; None when nothing needs a copy."""
        if not self.settings.needs_reference or (self.spec.lora_rank and not self.spec.kl_refresh_every):
            return None
        reference = load_policy(self.spec, trainable=False)
        return reference if self.spec.zero_stage < 3 else _initialize(reference, self.spec, trainable=False)

    def _refresh_reference(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Overwrite the reference with named weights."""
        targets = dict(_module(self.reference).language_model.named_parameters())
        for name, weight in weights:
            with torch.no_grad(), whole([targets[name]], modifier_rank=0):
                targets[name].copy_(weight)

    def _load_refreshed_reference(self, checkpoint: Path) -> None:
        """A refreshed reference is part of the state; the other kind is the model the run started from."""
        if self.reference is None or not self.spec.kl_refresh_every:
            return
        from safetensors.torch import load_file

        self._refresh_reference(iter(load_file(checkpoint / REFERENCE).items()))


def _module(model: Any) -> PolicyModel:
    """The policy itself, also inside a DeepSpeed engine."""
    module: PolicyModel = getattr(model, "module", model)
    return module


def _objective(
    hidden: Tensor, weight: Tensor, batch: ReplayBatch, settings: ObjectiveSettings, reference_weight: Tensor | None
) -> tuple[Tensor, Statistics]:
    return objective(hidden, weight, batch, settings, reference_weight=reference_weight)


def _score_batch(hidden: Tensor, weight: Tensor, batch: ReplayBatch, keep: KeptStates) -> ScoredLogits:
    return score_positions(hidden, weight, batch, keep=keep)


def objective_settings(spec: LearnerSpec) -> ObjectiveSettings:
    """The algorithm part of a spec."""
    return ObjectiveSettings(
        likelihood=spec.likelihood,  # type: ignore[arg-type]
        noise=spec.noise if spec.noise in ("gaussian", "dirichlet") else "gumbel",  # type: ignore[arg-type]
        noise_scale=spec.noise_scale,
        old_log_density=spec.old_log_density,
        policy_loss=spec.policy_loss,  # type: ignore[arg-type]
        clip_low=spec.clip_low,
        clip_high=spec.clip_high,
        dual_clip=spec.dual_clip,
        importance_cap=spec.importance_cap,
        entropy_bonus=spec.entropy_bonus,
        kl_coefficient=spec.kl_coefficient,
        kl_estimator=spec.kl_estimator,  # type: ignore[arg-type]
    )


def initialize_distributed(spec: LearnerSpec) -> None:
    """Join the process group that the environment names; a lost peer is noticed after `collective_timeout_s`."""
    import deepspeed

    timeout = timedelta(seconds=spec.collective_timeout_s)
    # Its shared-memory reduction serves inference only; left on, the first start compiles it for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if spec.device == "cuda" else "gloo", auto_mpi_discovery=False, timeout=timeout)
    _bound_gradient_collectives(timeout)


def _bound_gradient_collectives(timeout: timedelta) -> None:
    """DeepSpeed reduces and gathers in a copy of the world group, which it would make with torch's 10 or 30 minutes."""
    from deepspeed.utils import groups

    if not hasattr(groups, "_WORLD_GROUP"):
        raise LearnerError(
            "this DeepSpeed does not keep its copy of the world group where 0.19 does, so that "
            "learner.collective_timeout_s would not hold for gradients; install deepspeed>=0.19.8,<0.20"
        )
    if groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = torch.distributed.new_group(timeout=timeout)


def _initialize(policy: PolicyModel, spec: LearnerSpec, *, trainable: bool = True, load_universal: bool = False) -> Any:
    import deepspeed

    config = deepspeed_config(spec)
    config["checkpoint"]["load_universal"] = load_universal
    if not trainable:
        config["zero_optimization"].pop("offload_optimizer", None)
    optimizer = build_optimizer(policy, spec) if trainable else None
    return deepspeed.initialize(model=policy, optimizer=optimizer, config=config)[0]
