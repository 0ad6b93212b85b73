"""The language-model head without [T, V]: K dot products for soft positions, a chunked log-sum-exp for the rest.

    candidate_logits   z[T, K]                 gathers K rows of the weight per position (soft positions need no more:
                                               the vocabulary-wide normaliser cancels when candidates are renormalised)
    linear_lse_gather  z[T, K], lse[T], H[T]   loops over slices of the vocabulary with an online log-sum-exp
    linear_kl          KL[T]                   the same loop over two heads

They return differentiable statistics and leave the loss to autograd. Nothing of size [T, V] is ever kept: the backward
pass computes every slice of the logits again and writes each slice of the weight gradient once. Matrix products of half
types run on the device's tensor cores with fp32 accumulation and results; on a CPU they are computed in fp32.

`gather` is the hook for partitioned weights (ZeRO-3): a context manager under which `weight` is whole, entered in the
forward and again in the backward pass, e.g. `deepspeed.zero.GatheredParameters`. Tied embeddings need nothing special.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gather = Callable[[Tensor], AbstractContextManager[Any]]

WORKSPACE_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Of one fp32 slice of logits: stays in the caches of a CPU core, large enough for full-speed products on a GPU."""
CANDIDATE_WORKSPACE_BYTES = {"cpu": 2**19, "cuda": 64 * 2**20}
"""Of the weight rows gathered for one block of positions."""
LOG2_E = math.log2(math.e)
SLICE_BOUNDS = (512, 16384)
"""Vocabulary entries per slice, a multiple of 128."""


def candidate_logits(hidden: Tensor, weight: Tensor, ids: Tensor, *, gather: Gather | None = None) -> Tensor:
    """hidden [T, d], weight [V, d], ids [T, K] -> logits [T, K] fp32 (fp64 in fp64); differentiable in hidden, weight.

    Ids may repeat within and across rows; ids of filtered candidates must be valid rows of the weight.
    """
    return cast(Tensor, _CandidateLogits.apply(hidden, weight, ids.long(), gather or _resident))


def linear_lse_gather(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    entropy: bool = False,
    gather: Gather | None = None,
) -> tuple[Tensor, ...]:
    """hidden [T, d], weight [V, d], ids [T, K] -> (logits at ids [T, K], log-sum-exp over V [T]), never [T, V].

    Logits are divided by `temperature` (a number or [T]). With `entropy`, the entropy [T] of softmax(logits) is a third
    result. All results are fp32 (fp64 in fp64) and differentiable in hidden and weight; ids may repeat.
    """
    inverse = _inverse(temperature, hidden)
    return cast(
        tuple[Tensor, ...],
        _LinearLseGather.apply(hidden, weight, ids.long(), inverse, entropy, gather or _resident),
    )


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    gather: Gather | None = None,
) -> Tensor:
    """Exact KL(policy || reference) [T] over the vocabulary; hidden [T, d], weights [V, d], the reference constant."""
    inverse = _inverse(temperature, hidden)
    reference = (reference_hidden.detach(), reference_weight.detach())
    return cast(Tensor, _LinearKL.apply(hidden, weight, *reference, inverse, gather or _resident))


def _resident(weight: Tensor) -> AbstractContextManager[None]:
    return nullcontext()


def _inverse(temperature: Tensor | float, hidden: Tensor) -> Tensor | None:
    """[T, 1] factor of the logits, or None for 1."""
    if not isinstance(temperature, Tensor):
        if temperature == 1.0:
            return None
        temperature = hidden.new_full((hidden.shape[0],), temperature, dtype=_result_dtype(hidden))
    return temperature.to(_result_dtype(hidden)).reciprocal().unsqueeze(-1)


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Type of the factors of matrix products: half only where the device accumulates it in fp32."""
    if hidden.is_cuda and hidden.dtype == weight.dtype:
        return hidden.dtype
    return _result_dtype(hidden, weight)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with fp32 accumulation and result (fp64 in fp64); `out` is used where the types allow it."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out=out) if out is not None else torch.mm(a, b)


class _Slices:
    """The logits of [T, d] hidden states, one vocabulary slice at a time, in one reused buffer."""

    def __init__(self, hidden: Tensor, weight: Tensor, inverse: Tensor | None, slots: int = 1) -> None:
        self.product_dtype = _product_dtype(hidden, weight)
        self.result_dtype = _result_dtype(hidden, weight)
        self.hidden = hidden.to(self.product_dtype)
        self.weight = weight
        self.inverse = inverse
        rows = max(1, hidden.shape[0])
        wanted = WORKSPACE_BYTES[hidden.device.type] // (4 * rows * slots)
        self.width = min(max(SLICE_BOUNDS[0], wanted // 128 * 128), SLICE_BOUNDS[1], weight.shape[0])
        self.buffer = hidden.new_empty(rows * self.width, dtype=self.result_dtype)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.weight.shape[0], self.width):
            yield start, min(start + self.width, self.weight.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, d] of the weight, in the type of the products."""
        return self.weight[start:stop].to(self.product_dtype)

    def logits(self, start: int, stop: int) -> Tensor:
        """[T, stop - start], divided by the temperature; overwritten by the next call."""
        rows = self.hidden.shape[0]
        buffer = self.buffer[: rows * (stop - start)].view(rows, stop - start)
        logits = _product(self.hidden, self.rows(start, stop).t(), out=buffer)
        return logits if self.inverse is None else logits.mul_(self.inverse)


def _exp_(values: Tensor) -> Tensor:
    """exp in place; on a CPU torch's exp2 is four times as fast as its exp, and exp would be the slowest pass."""
    if values.is_cpu and values.dtype == torch.float32:
        return values.mul_(LOG2_E).exp2_()
    return values.exp_()


def _local(ids: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Ids relative to a slice, and which of them lie inside it; outside ones point at column 0."""
    inside = (ids >= start) & (ids < stop)
    return torch.where(inside, ids - start, 0), inside


class _GradientSink:
    """Accumulates dlogits slices into dhidden (fp32) and writes dweight slice by slice."""

    def __init__(self, slices: _Slices, needs_hidden: bool, needs_weight: bool) -> None:
        self.slices = slices
        shape = slices.hidden.shape
        self.hidden = slices.hidden.new_zeros(shape, dtype=slices.result_dtype) if needs_hidden else None
        self.weight = torch.empty_like(slices.weight) if needs_weight else None

    def add(self, dlogits: Tensor, start: int, stop: int) -> None:
        """Take the gradient [T, stop - start] of the logits before the division by the temperature."""
        dlogits = dlogits.to(self.slices.product_dtype)
        if self.hidden is not None:
            rows = self.slices.rows(start, stop)
            if dlogits.dtype == self.hidden.dtype:
                self.hidden.addmm_(dlogits, rows)
            else:
                self.hidden.add_(_product(dlogits, rows))
        if self.weight is not None:
            target = self.weight[start:stop]
            if target.dtype == dlogits.dtype:
                torch.mm(dlogits.t(), self.slices.hidden, out=target)
            else:
                target.copy_(_product(dlogits.t(), self.slices.hidden))


class _LinearLseGather(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        inverse: Tensor | None,
        entropy: bool,
        gather: Gather,
    ) -> tuple[Tensor, ...]:
        with gather(weight):
            slices = _Slices(hidden, weight, inverse)
            gathered = hidden.new_zeros(ids.shape, dtype=slices.result_dtype)
            highest = hidden.new_full((hidden.shape[0], 1), -torch.inf, dtype=slices.result_dtype)
            total = torch.zeros_like(highest)
            weighted = torch.zeros_like(highest) if entropy else None
            for start, stop in slices:
                logits = slices.logits(start, stop)
                local, inside = _local(ids, start, stop)
                gathered = torch.where(inside, logits.gather(-1, local), gathered)
                previous, highest = highest, torch.maximum(highest, logits.amax(-1, keepdim=True))
                shrink = (previous - highest).exp_()
                if weighted is None:
                    mass = _exp_(logits.sub_(highest))
                else:
                    mass = _exp_(logits - highest)
                    weighted = weighted * shrink + logits.mul_(mass).sum(-1, keepdim=True)
                total = total * shrink + mass.sum(-1, keepdim=True)
        lse = total.log() + highest
        statistics = [gathered, lse.squeeze(-1)]
        if weighted is not None:
            statistics.append((lse - weighted / total).squeeze(-1))
        ctx.save_for_backward(hidden, weight, ids, inverse, *statistics[1:])
        ctx.gather = gather
        ctx.set_materialize_grads(False)
        return tuple(statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """dlogits = p (g_lse - g_H (log p + H)) + scatter(g_z), times 1 / temperature."""
        hidden, weight, ids, inverse, lse, *entropies = ctx.saved_tensors
        g_gathered, g_lse, *g_entropies = gradients
        g_lse = torch.zeros_like(lse) if g_lse is None else g_lse
        g_entropy = g_entropies[0] if g_entropies else None
        with ctx.gather(weight):
            slices = _Slices(hidden, weight, inverse)
            sink = _GradientSink(slices, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
            for start, stop in slices:
                log_p = slices.logits(start, stop).sub_(lse.unsqueeze(-1))
                if g_entropy is None:
                    dlogits = _exp_(log_p).mul_(g_lse.unsqueeze(-1))
                else:
                    p = _exp_(log_p.clone())
                    shifted = log_p.add_(entropies[0].unsqueeze(-1))
                    dlogits = shifted.mul_(-g_entropy.unsqueeze(-1)).add_(g_lse.unsqueeze(-1)).mul_(p)
                if g_gathered is not None:
                    local, inside = _local(ids, start, stop)
                    dlogits.scatter_add_(-1, local, torch.where(inside, g_gathered, 0.0))
                sink.add(dlogits if inverse is None else dlogits.mul_(inverse), start, stop)
        dhidden = None if sink.hidden is None else sink.hidden.to(hidden.dtype)
        return dhidden, sink.weight, None, None, None, None


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        reference_hidden: Tensor,
        reference_weight: Tensor,
        inverse: Tensor | None,
        gather: Gather,
    ) -> Tensor:
        with gather(weight), gather(reference_weight):
            slices = _Slices(hidden, weight, inverse, slots=2)
            reference = _Slices(reference_hidden, reference_weight, inverse, slots=2)
            highest = hidden.new_full((hidden.shape[0], 1), -torch.inf, dtype=slices.result_dtype)
            total = torch.zeros_like(highest)
            difference = torch.zeros_like(highest)
            reference_lse = highest.clone()
            for start, stop in slices:
                logits, other = slices.logits(start, stop), reference.logits(start, stop)
                reference_lse = torch.logaddexp(reference_lse, torch.logsumexp(other, -1, keepdim=True))
                previous, highest = highest, torch.maximum(highest, logits.amax(-1, keepdim=True))
                shrink = (previous - highest).exp_()
                gap = other.neg_().add_(logits)
                mass = _exp_(logits.sub_(highest))
                total = total * shrink + mass.sum(-1, keepdim=True)
                difference = difference * shrink + gap.mul_(mass).sum(-1, keepdim=True)
        lse = total.log() + highest
        kl = difference / total - lse + reference_lse
        ctx.save_for_backward(hidden, weight, reference_hidden, reference_weight, inverse, lse, reference_lse, kl)
        ctx.gather = gather
        return kl.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """dlogits = p (log p - log q - KL) g, times 1 / temperature."""
        hidden, weight, reference_hidden, reference_weight, inverse, lse, reference_lse, kl = ctx.saved_tensors
        with ctx.gather(weight), ctx.gather(reference_weight):
            slices = _Slices(hidden, weight, inverse, slots=2)
            reference = _Slices(reference_hidden, reference_weight, inverse, slots=2)
            sink = _GradientSink(slices, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
            for start, stop in slices:
                log_p = slices.logits(start, stop).sub_(lse)
                log_q = reference.logits(start, stop).sub_(reference_lse)
                gap = log_q.neg_().add_(log_p).sub_(kl)
                dlogits = _exp_(log_p).mul_(gap).mul_(gradient.unsqueeze(-1))
                sink.add(dlogits if inverse is None else dlogits.mul_(inverse), start, stop)
        dhidden = None if sink.hidden is None else sink.hidden.to(hidden.dtype)
        return dhidden, sink.weight, None, None, None, None


class _CandidateLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, gather: Gather) -> Tensor:  # type: ignore[override]
        dtype = _result_dtype(hidden, weight)
        logits = hidden.new_empty(ids.shape, dtype=dtype)
        with gather(weight):
            for block in _row_blocks(ids, hidden):
                rows = _candidate_rows(weight, ids[block], dtype)
                # five times faster than a batched product of such thin matrices
                logits[block] = rows.mul_(hidden[block].to(dtype).unsqueeze(1)).sum(-1)
        ctx.save_for_backward(hidden, weight, ids)
        ctx.gather = gather
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, ids = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = gradient.dtype
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        with ctx.gather(weight):
            # half-precision sums over many positions would lose them: add up the rows that occur in fp32 first
            compact = needs_weight and weight.dtype != dtype
            if compact:
                unique, targets = ids.unique(return_inverse=True)
                dweight = hidden.new_zeros((unique.numel(), weight.shape[1]), dtype=dtype)
            else:
                targets = ids
                dweight = torch.zeros_like(weight) if needs_weight else None
            for block in _row_blocks(ids, hidden):
                g, h = gradient[block], hidden[block].to(dtype)
                if dhidden is not None:
                    rows = _candidate_rows(weight, ids[block], dtype)
                    dhidden[block] = torch.bmm(g.unsqueeze(1), rows).squeeze(1).to(hidden.dtype)
                if dweight is not None:
                    update = (g.unsqueeze(-1) * h.unsqueeze(1)).flatten(0, 1)
                    dweight.index_add_(0, targets[block].flatten(), update)
            if compact:
                sums = dweight
                dweight = torch.zeros_like(weight)
                dweight[unique] = sums.to(weight.dtype)
        return dhidden, dweight, None, None


def _row_blocks(ids: Tensor, hidden: Tensor) -> Iterator[slice]:
    """Blocks of positions whose gathered rows fit the workspace."""
    per_row = max(1, 4 * ids.shape[1] * hidden.shape[1])
    size = max(1, CANDIDATE_WORKSPACE_BYTES[hidden.device.type] // per_row)
    for start in range(0, ids.shape[0], size):
        yield slice(start, min(start + size, ids.shape[0]))


def _candidate_rows(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[t, K, d] rows of the weight."""
    return weight.index_select(0, ids.flatten()).view(*ids.shape, weight.shape[1]).to(dtype)
