"""Per-request state of the soft-token engine on the device, and the inputs built from it.

Flat tensors indexed by the runner's request slot, which does not move while a request runs:

    history_ids, history_weights [slots, M + 1, K]   row t = mixture of output position t; row M takes discarded writes
    think_len [slots]                                number of soft positions so far; -1 for discrete requests

The phase is not stored: a request thinks at output position t exactly while think_len == t. The input of position p
is the mixture history[p - prompt_len] where that index is below think_len, otherwise the plain embedding of its token.
Decoding, resuming after preemption and continuing a recorded prefix are therefore one code path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from rollout.soft_token import mix_embeddings, partial_mixture
from rollout.vllm_soft import CONFIG_KEY, REQUEST_KEY, SeamError, refuse_unsupported

NOT_THINKING = -1
_FLOATS = ("temperature", "top_p", "min_p", "gumbel_temperature", "noise_scale")


@dataclass(frozen=True)
class EngineSettings:
    """What all requests of one engine share; travels in vLLM's `additional_config`."""

    max_candidates: int
    """K, columns of the history."""
    max_thinking: int
    """M, rows of the history: the largest thinking budget."""
    end_of_thinking_id: int
    noise: str
    noise_clip: tuple[float, float] | None
    censor_delta: float | None
    log_epsilon: float
    forbidden_while_thinking: tuple[int, ...]
    """Tokens that may not be drawn while thinking (end of sequence, if the configuration forbids it there)."""
    entropy_stop: float | None
    """Nats; thinking is closed after `entropy_stop_steps` soft positions in a row below it."""
    entropy_stop_steps: int
    initial_version: int

    @classmethod
    def of(cls, vllm_config: Any) -> EngineSettings:
        """The settings that the engine put into the vLLM configuration."""
        values = (vllm_config.additional_config or {}).get(CONFIG_KEY)
        if values is None:
            raise SeamError(f"additional_config[{CONFIG_KEY!r}] is missing: start the engine through SoftEngine")
        clip = values["noise_clip"]
        return cls(
            **{
                **values,
                "noise_clip": None if clip is None else (float(clip[0]), float(clip[1])),
                "forbidden_while_thinking": tuple(values["forbidden_while_thinking"]),
            }
        )


class SlotTable:
    """The tensors of all request slots."""

    def __init__(self, num_slots: int, settings: EngineSettings, device: torch.device) -> None:
        self.settings = settings
        self.tagged = np.zeros(num_slots, dtype=bool)
        """Slots whose request came through our engine."""
        self.soft = np.zeros(num_slots, dtype=bool)
        """Slots of requests that think in soft tokens."""
        self.seed = UvaBackedTensor(num_slots, dtype=torch.int64)
        self.prompt_len = UvaBackedTensor(num_slots, dtype=torch.int32)
        self.budget = UvaBackedTensor(num_slots, dtype=torch.int32)
        self.top_k = UvaBackedTensor(num_slots, dtype=torch.int32)
        self.floats = UvaBackedTensor((num_slots, len(_FLOATS)), dtype=torch.float32)
        self.top_k.np.fill(1)  # slots of discrete requests pass through static-shape steps too
        self.floats.np.fill(1.0)
        rows = (num_slots, settings.max_thinking + 1, settings.max_candidates)
        self.think_len = torch.full((num_slots,), NOT_THINKING, dtype=torch.int32, device=device)
        self.history_ids = torch.zeros(rows, dtype=torch.int32, device=device)
        self.history_weights = torch.zeros(rows, dtype=torch.float32, device=device)
        self.history_entropy = torch.zeros(rows[:2], dtype=torch.float32, device=device)
        """Of the retained candidates, nats; written only where the configuration stops on it."""

    def set_request(self, slot: int, values: dict[str, Any]) -> None:
        """Write the settings of a soft request; visible on the device after `push`."""
        self.seed.np[slot] = values["seed"]
        self.prompt_len.np[slot] = values["prompt_len"]
        self.budget.np[slot] = values["budget"]
        self.top_k.np[slot] = values["top_k"]
        self.floats.np[slot] = [values[name] for name in _FLOATS]

    def push(self) -> None:
        """Make the host-written settings visible to the next step."""
        for tensor in (self.seed, self.prompt_len, self.budget, self.top_k, self.floats):
            tensor.copy_to_uva()


@dataclass(frozen=True)
class Stash:
    """The history of a preempted request, kept on the device in stream order."""

    think_len: Tensor
    ids: Tensor
    weights: Tensor
    entropy: Tensor


class SoftModelState(DefaultModelState):  # type: ignore[misc]
    """vLLM's model state with a history of mixtures per request."""

    supports_prompt_embeds = False

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        refuse_unsupported(vllm_config)
        if self.supports_mm_inputs or self.rope_state is not None:
            raise SeamError("soft tokens cannot be combined with multi-modal inputs or M-RoPE")
        self.settings = EngineSettings.of(vllm_config)
        self.table = SlotTable(self.max_num_reqs, self.settings, device)
        self.policy_version = self.settings.initial_version
        self.preempting: frozenset[str] = frozenset()
        """Requests that the current step preempts (set by the worker): their history is kept."""
        self.counters = {"stashed": 0, "resumed": 0, "rebuilt_rows": 0}
        self._stashes: dict[str, Stash] = {}
        self._slots: dict[str, int] = {}
        self._embedding = model.model.embed_tokens
        self._tensor_parallel = get_tp_group().world_size > 1
        self._on_host = device.type == "cpu"
        self.fuse = not (self._on_host or vllm_config.model_config.enforce_eager)
        """Compile the small operations around the model into few kernels."""
        self._mix_rows = torch.compile(mix_embeddings, dynamic=True) if self.fuse else mix_embeddings
        self._mix_shard = torch.compile(partial_mixture, dynamic=True) if self.fuse else partial_mixture
        # Graphs replay from this buffer; eager execution takes whatever tensor prepare_inputs returns.
        self._static_embeds: Tensor | None = None
        if self.fuse:
            shape = (self.max_num_tokens, self.inputs_embeds_size)
            self._static_embeds = torch.zeros(shape, dtype=self.dtype, device=device)
        self.check_embedding()

    def check_embedding(self) -> None:
        """A one-hot mixture must be the stock embedding: catches models that scale or normalise their lookup."""
        vocab = self.model_config.get_vocab_size()
        probe = torch.tensor(sorted({0, 1, vocab // 2, vocab - 1}), device=self.device)
        ids = torch.zeros(len(probe), self.settings.max_candidates, dtype=torch.int64, device=self.device)
        weights = torch.zeros(ids.shape, dtype=torch.float32, device=self.device)
        ids[:, 0] = probe
        weights[:, 0] = 1.0
        if not torch.equal(self._mix(ids, weights), self.model.embed_input_ids(probe)):
            raise SeamError(
                f"{type(self.model).__name__}: a one-hot mixture differs from embed_input_ids; this model transforms "
                "its embeddings, so mixtures of raw rows would be wrong inputs"
            )

    # --- request lifecycle ----------------------------------------------------------------------------------------

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Take over a new request, one that resumes after preemption, or one that continues a recorded prefix."""
        super().add_request(req_index, new_req_data)
        table = self.table
        params = new_req_data.sampling_params
        values: Any = (params.extra_args or {}).get(REQUEST_KEY) if params is not None else None
        stash = self._stashes.pop(new_req_data.req_id, None)
        self._slots[new_req_data.req_id] = req_index
        table.tagged[req_index] = values is not None
        table.soft[req_index] = values is not None and values["soft"]
        table.think_len[req_index] = NOT_THINKING
        table.prompt_len.np[req_index] = len(new_req_data.prompt_token_ids)
        if not table.soft[req_index]:
            return
        table.set_request(req_index, values)
        num_generated = len(new_req_data.prefill_token_ids) - values["prompt_len"]
        self._restore_history(req_index, new_req_data.req_id, values, stash, num_generated)

    def _restore_history(
        self, slot: int, request_id: str, values: dict[str, Any], stash: Stash | None, num_generated: int
    ) -> None:
        table = self.table
        if stash is None and "history_ids" in values and num_generated == values["history_positions"]:
            stash = Stash(
                torch.tensor(len(values["history_ids"]), dtype=torch.int32),
                torch.from_numpy(np.array(values["history_ids"], dtype=np.int32)),
                torch.from_numpy(np.array(values["history_weights"], dtype=np.float32)),
                torch.from_numpy(np.array(values["history_entropy"], dtype=np.float32)),
            )
        if num_generated == 0:
            table.think_len[slot] = 0
            return
        if stash is None:
            raise RuntimeError(
                f"the soft history of request {request_id} ({num_generated} positions) was lost on preemption; its "
                "continuation would be wrong. SoftWorker must be the worker class."
            )
        rows = stash.ids.shape[0]
        table.history_ids[slot, :rows] = stash.ids.to(table.history_ids.device)
        table.history_weights[slot, :rows] = stash.weights.to(table.history_weights.device)
        table.history_entropy[slot, :rows] = stash.entropy.to(table.history_entropy.device)
        # The engine may have dropped output that was in flight: what was not kept is drawn again, with the same noise.
        # A request that had stopped thinking before (think_len < generated) keeps its length.
        table.think_len[slot] = stash.think_len.to(table.think_len.device).clamp(max=num_generated)
        self.counters["resumed"] += 1

    def remove_request(self, req_id: str) -> None:
        """Forget a finished request; keep the history of a preempted one."""
        super().remove_request(req_id)
        slot = self._slots.pop(req_id, None)
        if slot is None:
            return
        table = self.table
        if table.soft[slot] and req_id in self.preempting:
            rows = min(int(table.budget.np[slot]), self.settings.max_thinking)
            self._stashes[req_id] = Stash(
                table.think_len[slot].clone(),
                table.history_ids[slot, :rows].clone(),
                table.history_weights[slot, :rows].clone(),
                table.history_entropy[slot, :rows].clone(),
            )
            self.counters["stashed"] += 1
        table.tagged[slot] = table.soft[slot] = False

    def forget(self, request_ids: set[str]) -> None:
        """Drop the histories of requests that finished or were aborted while preempted."""
        for request_id in request_ids:
            self._stashes.pop(request_id, None)

    @property
    def num_stashed(self) -> int:
        """Histories waiting for their request to resume."""
        return len(self._stashes)

    def apply_staged_writes(self) -> None:
        """Push host-written settings to the device, once per step with new requests."""
        super().apply_staged_writes()
        self.table.push()

    # --- model inputs ---------------------------------------------------------------------------------------------

    def _mix(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Mixtures [rows, H] in the model's dtype of candidates [rows, K]: fp32 sum, one rounding."""
        if not self._tensor_parallel:
            return self._mix_rows(self._embedding.weight, ids, weights)
        shard = self._embedding.shard_indices
        start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        part = self._mix_shard(self._embedding.weight, ids, weights, start, end)
        return tensor_model_parallel_all_reduce(part).to(self.dtype)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """The stock inputs, with `inputs_embeds` wherever a scheduled position is soft (always, for graphs)."""
        inputs = super().prepare_inputs(input_batch, req_states)
        slots_np = input_batch.idx_mapping_np
        any_soft = bool(self.table.soft[slots_np].any())
        if self._static_embeds is None and not any_soft:
            return inputs  # the model looks its tokens up itself, as it does for discrete decoding everywhere
        num_tokens = input_batch.num_tokens
        embeds = self.model.embed_input_ids(input_batch.input_ids[:num_tokens])
        if self._static_embeds is not None:
            buffer = self._static_embeds[: input_batch.num_tokens_after_padding]
            buffer[:num_tokens].copy_(embeds)
            embeds = buffer
        if any_soft:
            last = input_batch.query_start_loc[1 : input_batch.num_reqs + 1].long() - 1
            self._overlay(embeds, last, input_batch.idx_mapping, input_batch.positions[last])
            if input_batch.has_prefill:
                self._rebuild_prefilled(embeds, input_batch)
        inputs["inputs_embeds"] = embeds
        return inputs

    def _rebuild_prefilled(self, embeds: Tensor, input_batch: Any) -> None:
        """Requests that are prefilled beyond their prompt (resumed, continued) need every generated row, not only the
        last; the ranges are known on the host."""
        slots_np = input_batch.idx_mapping_np
        for row in np.nonzero(input_batch.is_prefilling_np & self.table.soft[slots_np])[0]:
            slot = int(slots_np[row])
            begin = int(input_batch.num_computed_tokens_np[row])
            end = begin + int(input_batch.num_scheduled_tokens[row])
            first = max(begin, int(self.table.prompt_len.np[slot]))
            if first >= end:
                continue
            offset = int(input_batch.query_start_loc_np[row]) - begin
            rows = torch.arange(first + offset, end + offset, device=embeds.device)
            slots = torch.full_like(rows, slot)
            self._overlay(embeds, rows, slots, input_batch.positions[rows])
            self.counters["rebuilt_rows"] += end - first

    def _overlay(self, embeds: Tensor, rows: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Replace the embedding rows whose position is soft by their mixtures, in place."""
        table = self.table
        index = positions - table.prompt_len.gpu[slots]
        soft = (index >= 0) & (index < table.think_len[slots])
        if self._on_host:
            soft_rows = soft.nonzero()[:, 0]
            if soft_rows.shape[0] == 0:
                return
            if soft_rows.shape[0] < soft.shape[0]:
                rows, slots, index = rows[soft_rows], slots[soft_rows], index[soft_rows]
            embeds[rows] = self._mix(table.history_ids[slots, index], table.history_weights[slots, index])
            return
        index = index.clamp(0, self.settings.max_thinking)
        mixed = self._mix(table.history_ids[slots, index], table.history_weights[slots, index])
        embeds[rows] = torch.where(soft[:, None], mixed, embeds[rows])

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Inputs for profiling and graph capture: the same static buffer that real steps fill."""
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        if self._static_embeds is not None:
            inputs["inputs_embeds"] = self._static_embeds[:num_tokens]
        return inputs

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        """Wrap the stock sampler; there is no rejection sampler."""
        from rollout.vllm_sampler import SoftSampler

        return SoftSampler(sampler, self), None
