"""One decoding step: soft tokens for thinking rows, the stock sampler for the others, the payload for both.

Runs on the device without host synchronisation and with static shapes; on a CPU, where looking at a tensor is free,
rows are partitioned instead, so that nobody pays for the other phase.

The payload rides in the logprobs tensors, which vLLM copies, slices per request and aligns with the tokens:

    logprob_token_ids   [rows, 1 + K] int64   token | candidate ids
    logprobs            [rows, 2 + 3K] fp32   log-density | threshold | log-probs | noise | weights
    selected ranks      [rows] int64          policy version * 4 + kind

A batch without thinking rows sends the first column(s) only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS

from rollout.noise import CounterNoise
from rollout.payload import KIND_BITS
from rollout.soft_token import SoftTokenParams, SoftTokens, sample_soft_tokens
from rollout.trajectory import Kind
from rollout.vllm_soft import REQUEST_KEY
from rollout.vllm_state import SoftModelState

_HOST_ROWS = 16
"""Rows of logits processed together on a CPU: temporaries that fit the cache are worth a factor of two to four."""


class SoftSampler(Sampler):  # type: ignore[misc]
    """The stock sampler of the runner, with the thinking phase in front."""

    def __init__(self, stock: Sampler, state: SoftModelState) -> None:
        # Not super().__init__(): the stock sampler exists already and owns its state tensors; this is the same
        # object with one more method in front.
        self.__dict__.update(stock.__dict__)
        self._state = state
        self._on_host = state.device.type == "cpu"
        forbidden = state.settings.forbidden_while_thinking
        self._forbidden = torch.tensor(forbidden, device=state.device) if forbidden else None
        # The draw is some hundred small operations on [rows, K]: a CPU does not mind, a GPU would wait for launches.
        self._fused = torch.compile(sample_soft_tokens, dynamic=True) if state.fuse else None

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Stock bookkeeping; the logprob columns of our requests are written here, not by the stock sampler."""
        super().add_request(req_idx, sampling_params)
        if REQUEST_KEY in (sampling_params.extra_args or {}):
            self.sampling_states.num_logprobs[req_idx] = NO_LOGPROBS

    def __call__(self, logits: Tensor, input_batch: Any) -> SamplerOutput:
        """Sample every row of the batch; `logits` [rows, V]."""
        slots_np = input_batch.idx_mapping_np
        if not self._state.table.tagged[slots_np].any():
            return super().__call__(logits, input_batch)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            input_batch.seq_lens.new_ones(input_batch.num_reqs),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.req_states.prefill_len.gpu,
        )
        if self._state.table.soft[slots_np].any():
            tokens, payload = self._mixed_step(logits, input_batch, num_sampled)
        else:
            tokens, payload = self._discrete_step(logits, input_batch)
        return SamplerOutput(
            sampled_token_ids=tokens[:, None],
            logprobs_tensors=payload,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    # --- discrete ---------------------------------------------------------------------------------------------------

    def _discrete_step(self, logits: Tensor, input_batch: Any) -> tuple[Tensor, LogprobsTensors]:
        tokens = self._stock_tokens(logits, input_batch, None)
        temperature = self.sampling_states.temperature.gpu[input_batch.idx_mapping]
        density = token_logprobs(logits, tokens, temperature)
        ranks = torch.full_like(tokens, self._rank(Kind.DISCRETE))
        return tokens, LogprobsTensors(tokens[:, None], density[:, None], ranks)

    def _stock_tokens(self, logits: Tensor, input_batch: Any, rows: Tensor | None) -> Tensor:
        """Tokens [rows] int64 that the stock sampler draws with the answer settings."""
        last = input_batch.logits_indices
        slots_np = input_batch.idx_mapping_np
        upper_bound = input_batch.seq_lens_cpu_upper_bound.numpy()
        arguments = (
            input_batch.expanded_idx_mapping,
            input_batch.idx_mapping,
            input_batch.positions[last],
            input_batch.input_ids[last],
            input_batch.expanded_local_pos,
        )
        if rows is not None:
            logits = logits[rows]
            arguments = tuple(tensor[rows] for tensor in arguments)
            slots_np, upper_bound = slots_np[rows.numpy()], upper_bound[rows.numpy()]
        expanded, slots, positions, input_ids, local = arguments
        tokens, _ = self.sample(logits, expanded, slots, slots_np, positions, input_ids, local, upper_bound)
        return tokens

    def _rank(self, kind: Kind) -> int:
        return (self._state.policy_version << KIND_BITS) | int(kind)

    # --- thinking ---------------------------------------------------------------------------------------------------

    def _mixed_step(self, logits: Tensor, input_batch: Any, num_sampled: Tensor) -> tuple[Tensor, LogprobsTensors]:
        table = self._state.table
        slots = input_batch.idx_mapping
        step = input_batch.seq_lens[: input_batch.num_reqs] - table.prompt_len.gpu[slots]
        thinking = (num_sampled > 0) & (table.think_len[slots] == step)
        if not self._on_host:
            return self._static_step(logits, input_batch, slots, step, thinking)
        rows = thinking.nonzero()[:, 0]
        if rows.shape[0] == 0:
            return self._discrete_step(logits, input_batch)
        if rows.shape[0] == thinking.shape[0]:
            return self._all_thinking(logits, slots, step)
        return self._partitioned(logits, input_batch, slots, step, rows, (~thinking).nonzero()[:, 0])

    def _all_thinking(self, logits: Tensor, slots: Tensor, step: Tensor) -> tuple[Tensor, LogprobsTensors]:
        drawn = self._draw(logits, slots, step)
        tokens, kinds = self._advance(drawn, slots, step, None)
        density = torch.zeros(tokens.shape[0])
        ended = (kinds == Kind.ENDED).nonzero()[:, 0]
        if ended.shape[0]:
            temperature = self._state.table.floats.gpu[slots[ended], 0]
            density[ended] = token_logprobs(logits[ended], tokens[ended], temperature)
        return tokens, self._payload(tokens, kinds, density, drawn)

    def _partitioned(
        self, logits: Tensor, input_batch: Any, slots: Tensor, step: Tensor, rows: Tensor, others: Tensor
    ) -> tuple[Tensor, LogprobsTensors]:
        tokens = torch.empty(slots.shape[0], dtype=torch.int64)
        tokens[others] = self._stock_tokens(logits, input_batch, others)
        thought, soft_payload = self._all_thinking(logits[rows], slots[rows], step[rows])
        tokens[rows] = thought
        temperature = self.sampling_states.temperature.gpu[slots[others]]
        ids = torch.zeros(len(tokens), soft_payload.logprob_token_ids.shape[1], dtype=torch.int64)
        values = torch.zeros(len(tokens), soft_payload.logprobs.shape[1])
        ranks = torch.full_like(tokens, self._rank(Kind.DISCRETE))
        ids[rows], values[rows], ranks[rows] = soft_payload[:3]
        ids[others, 0] = tokens[others]
        values[others, 0] = token_logprobs(logits[others], tokens[others], temperature)
        return tokens, LogprobsTensors(ids, values, ranks)

    def _static_step(
        self, logits: Tensor, input_batch: Any, slots: Tensor, step: Tensor, thinking: Tensor
    ) -> tuple[Tensor, LogprobsTensors]:
        """The same with static shapes: both phases for all rows, chosen by masks. The stock sampler leaves the
        logits as they are (it copies them where it must change them)."""
        drawn = self._draw(logits, slots, step)
        answered = self._stock_tokens(logits, input_batch, None)
        thought, kinds = self._advance(drawn, slots, step, thinking)
        tokens = torch.where(thinking, thought, answered)
        kinds = torch.where(thinking, kinds, int(Kind.DISCRETE))
        answer_temperature = self.sampling_states.temperature.gpu[slots]
        temperature = torch.where(thinking, self._state.table.floats.gpu[slots, 0], answer_temperature)
        density = token_logprobs(logits, tokens, temperature)
        scored = (kinds == Kind.DISCRETE) | (kinds == Kind.ENDED)
        return tokens, self._payload(tokens, kinds, torch.where(scored, density, 0.0), drawn)

    def _draw(self, logits: Tensor, slots: Tensor, step: Tensor) -> SoftTokens:
        """Soft tokens of all given rows, by the one sampler of this project."""
        table, settings = self._state.table, self._state.settings
        temperature, top_p, min_p, gumbel_temperature, noise_scale = table.floats.gpu[slots].unbind(1)
        params = SoftTokenParams(
            temperature=temperature,
            top_k=table.top_k.gpu[slots],
            top_p=top_p,
            min_p=min_p,
            gumbel_temperature=gumbel_temperature,
            noise=settings.noise,  # type: ignore[arg-type]
            noise_scale=noise_scale,
            noise_clip=settings.noise_clip,
            max_candidates=settings.max_candidates,
            censor_delta=settings.censor_delta,
            log_epsilon=settings.log_epsilon,
        )
        noise = CounterNoise(table.seed.gpu[slots], step)
        sample = self._fused or sample_soft_tokens
        if self._forbidden is None:
            return sample(logits, params, noise)
        kept = logits[:, self._forbidden]
        logits[:, self._forbidden] = -math.inf
        drawn = sample(logits, params, noise)
        logits[:, self._forbidden] = kept
        return drawn

    def _advance(
        self, drawn: SoftTokens, slots: Tensor, step: Tensor, thinking: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Emitted tokens and kinds of thinking rows; writes the history and moves the phase on.

        `thinking` None means that all rows think. Rows that do not write hit the spare row M of the history.
        """
        table, settings = self._state.table, self._state.settings
        top = drawn.ids[:, 0].to(torch.int64)
        forced = step >= table.budget.gpu[slots]
        if settings.entropy_stop is not None:
            forced |= self._settled(slots, step)
        ended = (top == settings.end_of_thinking_id) & ~forced
        tokens = torch.where(forced, settings.end_of_thinking_id, top)
        closed = forced | ended
        soft = ~closed if thinking is None else thinking & ~closed
        kinds = torch.where(closed, torch.where(forced, int(Kind.FORCED), int(Kind.ENDED)), int(Kind.SOFT))
        row = torch.where(soft, step, settings.max_thinking)
        table.history_ids[slots, row] = drawn.ids
        table.history_weights[slots, row] = drawn.weights
        if settings.entropy_stop is not None:
            table.history_entropy[slots, row] = -torch.special.xlogy(drawn.logprobs.exp(), drawn.logprobs.exp()).sum(1)
        table.think_len.index_add_(0, slots, soft.to(torch.int32))
        return tokens, kinds

    def _settled(self, slots: Tensor, step: Tensor) -> Tensor:
        """Rows whose last positions were all of low entropy. Read from the history, not counted along: what a cache
        reset drops and draws again is not counted twice."""
        settings = self._state.settings
        back = torch.arange(1, settings.entropy_stop_steps + 1, device=step.device)
        recent = (step[:, None] - back).clamp(min=0, max=settings.max_thinking)
        low = self._state.table.history_entropy[slots[:, None], recent] < settings.entropy_stop
        return (step >= settings.entropy_stop_steps) & low.all(dim=1)

    def _payload(self, tokens: Tensor, kinds: Tensor, density: Tensor, drawn: SoftTokens) -> LogprobsTensors:
        threshold = torch.full_like(density, math.nan) if drawn.threshold is None else drawn.threshold
        head = torch.stack((density, threshold), dim=1)
        return LogprobsTensors(
            torch.cat((tokens[:, None], drawn.ids.to(torch.int64)), dim=1),
            torch.cat((head, drawn.logprobs, drawn.noise, drawn.weights), dim=1),
            kinds.to(torch.int64) + (self._state.policy_version << KIND_BITS),
        )


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: Tensor) -> Tensor:
    """Full-vocabulary log-probability of `tokens` [B] under softmax(logits [B, V] / temperature [B]), fp32.

    Greedy rows (temperature 0) are scored at temperature 1.
    """
    divisor = torch.where(temperature == 0, 1.0, temperature)[:, None]
    if logits.device.type != "cpu" or len(tokens) <= _HOST_ROWS:
        return _scaled_logprobs(logits, tokens, divisor)
    chunks = zip(logits.split(_HOST_ROWS), tokens.split(_HOST_ROWS), divisor.split(_HOST_ROWS), strict=True)
    return torch.cat([_scaled_logprobs(*chunk) for chunk in chunks])


def _scaled_logprobs(logits: Tensor, tokens: Tensor, divisor: Tensor) -> Tensor:
    if logits.device.type == "cpu":
        # One fused pass that writes the whole vocabulary takes half as long as logsumexp there.
        scaled = logits if bool((divisor == 1).all()) else logits / divisor
        return torch.log_softmax(scaled, dim=-1, dtype=torch.float32).gather(1, tokens[:, None])[:, 0]
    scaled = logits.to(torch.float32) / divisor
    return scaled.gather(1, tokens[:, None])[:, 0] - torch.logsumexp(scaled, dim=-1)
