"""Soft-token decoding as plainly as it can be written: one request, a transformers model, one position at a time.

Independent of the product in everything but the noise functions: own filter (full softmax, full sort, fp64 numpy),
own mixture, own phase logic, no batching, no KV reuse between requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rollout.cpu_sampling import uniform_draws
from rollout.noise import CounterNoise

DISCRETE, SOFT, ENDED, FORCED = range(4)


@dataclass
class Position:
    """What one position should be."""

    kind: int
    token: int
    log_density: float
    margin: float
    """How far the decision was from another one, in units of its own quantity; tiny means a near-tie."""
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0))
    noise: np.ndarray = field(default_factory=lambda: np.zeros(0))
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0))


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max()
    return shifted - np.log(np.exp(shifted).sum())


def gumbel(seed: int, step: int, ids: np.ndarray) -> np.ndarray:
    source = CounterNoise(torch.tensor([seed]), torch.tensor([step]))
    return source(torch.tensor(ids[None])).numpy()[0].astype(np.float64)


def soft_position(logits: np.ndarray, values: dict[str, Any], seed: int, step: int, delta: float | None) -> Position:
    """Candidates sorted by perturbed value; only the retained ones are listed."""
    greedy = values["temperature"] == 0
    temperature = 1.0 if greedy else values["temperature"]
    top_k = 1 if greedy else values["top_k"]
    order = np.lexsort((np.arange(len(logits)), -logits))
    boundary = logits[order[top_k - 1]] - logits[order[top_k]]
    candidates = order[:top_k]
    p = np.exp(log_softmax(logits[candidates] / temperature))
    before = np.cumsum(p) - p
    keep = (before < values["top_p"]) | (values["top_p"] >= 1.0)
    keep &= p >= values["min_p"] * p[0]
    top_p_gap = np.abs(before[1:] - values["top_p"]).min(initial=1.0)
    ids = candidates[keep]
    logprobs = log_softmax(logits[ids] / temperature)
    noise = np.zeros(len(ids)) if greedy else gumbel(seed, step, ids)
    perturbed = logprobs + values["noise_scale"] * noise
    ranking = np.argsort(-perturbed, kind="stable")
    ids, logprobs, noise, perturbed = ids[ranking], logprobs[ranking], noise[ranking], perturbed[ranking]
    tau = values["gumbel_temperature"]
    weights = np.exp(log_softmax(perturbed / tau))
    if delta is not None:
        weights = np.where(perturbed >= perturbed[0] + tau * np.log(delta), weights, 0.0)
        weights = weights / weights.sum()
    margin = min(boundary, top_p_gap, perturbed[0] - perturbed[1] if len(ids) > 1 else 1.0)
    density = float((-noise - np.exp(-noise)).sum())
    return Position(SOFT, int(ids[0]), density, margin, ids, logprobs, noise, weights)


def answer_position(logits: np.ndarray, values: dict[str, Any], seed: int, position: int) -> Position:
    """An ordinary token: top-k, top-p, inverse distribution function."""
    temperature = values["answer_temperature"]
    scored = log_softmax(logits / (temperature or 1.0))
    if temperature == 0:
        token = int(np.argmax(logits))
        runner_up = np.partition(logits, -2)[-2]
        return Position(DISCRETE, token, float(scored[token]), float(logits[token] - runner_up))
    masked = logits / temperature
    if 0 < values["answer_top_k"] < len(logits):
        threshold = np.sort(masked)[-values["answer_top_k"]]
        masked = np.where(masked < threshold, -np.inf, masked)
    if values["answer_top_p"] < 1:
        order = np.argsort(masked)
        cumulative = np.cumsum(np.exp(log_softmax(masked[order])))
        drop = cumulative <= 1 - values["answer_top_p"]
        drop[-1] = False
        masked[order[drop]] = -np.inf
    cumulative = np.cumsum(np.exp(log_softmax(masked)))
    uniform = float(uniform_draws(torch.tensor([seed]), torch.tensor([position]))[0])
    target = uniform * cumulative[-1]
    token = int(np.searchsorted(cumulative, target, side="right"))
    return Position(DISCRETE, token, float(scored[token]), float(np.abs(cumulative - target).min()))


def settled(positions: list[Position], entropy_stop: tuple[float, int] | None) -> bool:
    if entropy_stop is None or len(positions) < entropy_stop[1]:
        return False
    recent = positions[-entropy_stop[1] :]
    return all(-(np.exp(p.logprobs) * p.logprobs).sum() < entropy_stop[0] for p in recent)


@torch.no_grad()
def naive_loop(
    model: Any,
    prompt: tuple[int, ...],
    seed: int,
    values: dict[str, Any],
    *,
    thinks: bool,
    end_id: int,
    stop_ids: tuple[int, ...],
    delta: float | None,
    forbid_stop: bool = False,
    entropy_stop: tuple[float, int] | None = None,
) -> list[Position]:
    """Every position of one response."""
    table = model.get_input_embeddings().weight
    embeds = table[torch.tensor(prompt)][None]
    cache, positions = None, []
    for step in range(values["max_new_tokens"]):
        output = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[0, -1].double().numpy()
        if not thinks:
            position = answer_position(logits, values, seed, len(prompt) + step - 1)
        elif step >= values["thinking_budget"] or settled(positions, entropy_stop):
            position = Position(FORCED, end_id, 0.0, 1.0)
        else:
            open_logits = logits.copy()
            if forbid_stop:
                open_logits[list(stop_ids)] = -np.inf
            position = soft_position(open_logits, values, seed, step, delta)
            if position.token == end_id:
                position.kind = ENDED
                position.log_density = float(log_softmax(logits / (values["temperature"] or 1.0))[end_id])
        positions.append(position)
        thinks = position.kind == SOFT
        if position.token in stop_ids:
            break
        if position.kind == SOFT:
            weights = torch.tensor(position.weights, dtype=torch.float32)
            embeds = (weights[:, None] * table[torch.tensor(position.ids)]).sum(0)[None, None]
        else:
            embeds = table[position.token][None, None]
    return positions


@torch.no_grad()
def replayed_logprobs(model: Any, trajectory: Any, temperatures: np.ndarray) -> np.ndarray:
    """Full-vocabulary log-probability of every emitted token of a recorded trajectory under `model`, in one pass."""
    table = model.get_input_embeddings().weight
    response = table[torch.tensor(trajectory.response_ids.astype(np.int64))].clone()
    soft = np.flatnonzero(trajectory.kinds == SOFT)
    ids = torch.tensor(trajectory.candidate_ids.astype(np.int64))
    response[soft] = (torch.tensor(trajectory.weights)[..., None] * table[ids]).sum(1)
    embeds = torch.cat((table[torch.tensor(trajectory.prompt_ids.astype(np.int64))], response))[None]
    logits = model(inputs_embeds=embeds).logits[0, len(trajectory.prompt_ids) - 1 : -1].double()
    scaled = torch.log_softmax(logits / torch.tensor(temperatures)[:, None], dim=-1)
    return scaled.gather(1, torch.tensor(trajectory.response_ids.astype(np.int64))[:, None])[:, 0].numpy()
