"""A short supervised run that gives a small random model something to improve: plain torch, one process.

It trains until a teacher-forced accuracy is reached, in a first run of `steps` updates and then in blocks, because a
policy that cannot do the arithmetic yet looks exactly like a reinforcement-learning bug later.

    examples (prompt ids, response ids) --batches--> AdamW(.9, .98), warm-up, linear decay --gate--> checkpoint
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

BETAS = (0.9, 0.98)
WARMUP_UPDATES = 20
CONTINUATION_RATE = 0.5
"""Peak learning rate of a continuation block, as a share of the first run's."""
IGNORED = -100
"""Label of positions outside the loss."""

Example = tuple[Sequence[int], Sequence[int]]
"""Prompt ids, response ids."""


class WarmStartError(RuntimeError):
    """The warm start ended without passing its gate, or ran out of examples."""


@dataclass(frozen=True)
class Gate:
    """Greedy teacher-forced accuracy that the model must reach on held-out examples."""

    examples: Sequence[tuple[Sequence[int], Sequence[int], Sequence[bool]]]
    """Prompt ids, response ids, and which response positions are judged."""
    min_accuracy: float
    block_steps: int = 100
    """Updates added each time the gate is not passed."""
    max_steps: int = 600
    """Updates after which the warm start fails."""


@dataclass(frozen=True)
class WarmStartReport:
    """What the warm start did."""

    steps: int
    loss: float
    """Mean cross-entropy per response token over the last 10 updates, nats."""
    accuracy: float | None
    """On the gate's judged positions; None without a gate."""
    seconds: float
    path: str


def warm_start(
    model_dir: str | Path,
    out_dir: str | Path,
    examples: Iterable[Example],
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    gate: Gate | None = None,
) -> WarmStartReport:
    """Train the checkpoint in `model_dir` on `examples` and save it (with the tokenizer) in `out_dir`.

    A sequence of examples is reshuffled every epoch; any other iterable is read once and must last for
    `batch` x the number of updates. Runs in fp32 on the CPU.

    Raises `WarmStartError` if the gate is not passed within `gate.max_steps`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.train()
    batches = _batches(examples, batch, seed)
    losses = _train(model, batches, steps, lr)
    accuracy = teacher_forced_accuracy(model, gate) if gate else None
    while gate and accuracy is not None and accuracy < gate.min_accuracy:
        if len(losses) >= gate.max_steps:
            raise WarmStartError(
                f"teacher-forced accuracy {accuracy:.3f} after {len(losses)} updates, {gate.min_accuracy} wanted; "
                "raise the number of updates or the learning rate, or make the task easier"
            )
        logger.info("warm start: accuracy %.3f after %d updates, going on", accuracy, len(losses))
        losses += _train(model, batches, min(gate.block_steps, gate.max_steps - len(losses)), CONTINUATION_RATE * lr)
        accuracy = teacher_forced_accuracy(model, gate)
    model.save_pretrained(out_dir)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(out_dir)
    recent = losses[-10:]
    return WarmStartReport(
        steps=len(losses),
        loss=sum(recent) / len(recent),
        accuracy=accuracy,
        seconds=time.perf_counter() - started,
        path=str(out_dir),
    )


def teacher_forced_accuracy(model: PreTrainedModel, gate: Gate, batch: int = 256) -> float:
    """Share of the judged positions at which the most likely token, given the true prefix, is the true one."""
    hits = judged = 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(gate.examples), batch):
            chunk = gate.examples[start : start + batch]
            ids, mask, labels = collate([(prompt, response) for prompt, response, _ in chunk])
            wanted = torch.zeros_like(labels, dtype=torch.bool)
            for row, (prompt, response, positions) in enumerate(chunk):
                wanted[row, len(prompt) : len(prompt) + len(response)] = torch.tensor(positions, dtype=torch.bool)
            best = model(input_ids=ids, attention_mask=mask).logits[:, :-1].argmax(-1)
            hits += int((best == ids[:, 1:])[wanted[:, 1:]].sum())
            judged += int(wanted[:, 1:].sum())
    model.train(was_training)
    if not judged:
        raise WarmStartError("the gate judges no position; mark some in its examples")
    return hits / judged


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, attention mask and labels, all [B, L] int64; labels are `IGNORED` outside the responses."""
    longest = max(len(prompt) + len(response) for prompt, response in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, response) in enumerate(examples):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    return ids, mask, labels


def _train(model: PreTrainedModel, batches: Iterator[list[Example]], steps: int, peak_lr: float) -> list[float]:
    """Losses of `steps` updates: linear warm-up, then linear decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=BETAS, weight_decay=0.0)
    losses = []
    for step in range(steps):
        warm = min(1.0, (step + 1) / WARMUP_UPDATES)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * warm * (1 - step / steps)
        ids, mask, labels = collate(next(batches))
        hidden = model.base_model(input_ids=ids, attention_mask=mask)[0][:, :-1]
        targets = labels[:, 1:]
        answered = targets != IGNORED
        loss = functional.cross_entropy(model.get_output_embeddings()(hidden[answered]), targets[answered])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _batches(examples: Iterable[Example], size: int, seed: int) -> Iterator[list[Example]]:
    stream = iter(_epochs(examples, seed)) if isinstance(examples, Sequence) else iter(examples)
    while True:
        chunk = list(itertools.islice(stream, size))
        if len(chunk) < size:
            raise WarmStartError(f"the examples ran out: {len(chunk)} left for a batch of {size}")
        yield chunk


def _epochs(examples: Sequence[Any], seed: int) -> Iterator[Any]:
    rng = random.Random(seed)
    order = list(range(len(examples)))
    while order:
        rng.shuffle(order)
        yield from (examples[i] for i in order)
