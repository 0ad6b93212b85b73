"""Tokens per second of soft decoding, against discrete decoding of the stock engine and against a plain loop.

`k*/b*`: the same model in two engines of one process, soft requests in ours (thinking all the time, whole payload
recorded), discrete requests in stock vLLM (stock architecture, scheduler and front end; same runner, kernels and
threads). Legs alternate A-B-A-B; the ratio is the median over pairs, so that a busy machine slows both.
`discrete/b32`: discrete requests in ours, each token's log-probability recorded, against the same stock engine.
`loop_*`: our engine against a transformers loop with a KV cache that draws with the same sampler.

BENCH_SECONDS (10) is the length of a leg, BENCH_PAIRS (7) their number.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rollout.engine import EngineSpec, RequestSettings, SoftEngine, engine_environment
from rollout.noise import CounterNoise
from rollout.request import RolloutRequest
from rollout.soft_token import SoftTokenParams, mix_embeddings, sample_soft_tokens
from rollout.trajectory import Kind
from tests.benchmarks.row import Row

SECONDS = float(os.environ.get("BENCH_SECONDS", "10"))
PAIRS = int(os.environ.get("BENCH_PAIRS", "7"))
VOCABULARY, HIDDEN, LAYERS = 32_000, 512, 8
PROMPT = tuple(range(10, 26))
NEW_TOKENS = 64
MAX_LENGTH = 512
TARGETS = {1: 0.90, 32: 0.95, 128: 0.95}
SOFT_ROWS = {f"soft_decode/k{k}/b{batch}": (k, batch) for k in (5, 10) for batch in TARGETS}
DISCRETE_ROW, DISCRETE_BATCH = "soft_decode/discrete/b32", 32
LOOP_ROWS = {"soft_decode/loop_equal", "soft_decode/loop_lognormal"}
LOOP_BATCH = 64

_numbers = itertools.count()


def run(names: set[str] | None) -> list[Row]:
    """All rows, or those asked for. Raises `ValueError` for a row that does not exist."""
    known = {*SOFT_ROWS, DISCRETE_ROW, *LOOP_ROWS}
    if names is not None and not names <= known:
        raise ValueError(f"{', '.join(sorted(names - known))}: not among {', '.join(sorted(known))}")
    wanted = known if names is None else names
    legs = 2 * PAIRS * len(wanted - {"soft_decode/loop_lognormal"})
    print(f"soft_decode: {len(wanted)} rows, at least {legs * SECONDS / 60:.0f} minutes", file=sys.stderr, flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        model = build_model(Path(directory))
        return [*engine_rows(model, wanted), *loop_rows(model, wanted)]


def build_model(directory: Path) -> Path:
    """A random Llama of 8 layers, hidden 512, 32,000 tokens, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import build_tiny_model

    build_tiny_model(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2 * MAX_LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    return directory


def spec_for(model: Path, num_candidates: int) -> EngineSpec:
    return EngineSpec(
        model_path=str(model),
        dtype="float32",
        max_num_seqs=128,
        max_model_len=MAX_LENGTH + len(PROMPT),
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=256 << 20,
        block_size=32,
        enforce_eager=True,
        end_of_thinking_id=4,
        soft={"max_candidates": num_candidates, "top_k": num_candidates, "censor_delta": 1e-3},
        max_new_tokens=MAX_LENGTH,
        thinking_budget=MAX_LENGTH,
    )


# --- against the stock engine ---------------------------------------------------------------------------------------


def engine_rows(model: Path, names: set[str]) -> list[Row]:
    """Soft over discrete, at K = 5 and 10 and three batch sizes; discrete in our engine over discrete in the stock."""
    wanted = [case for name, case in SOFT_ROWS.items() if name in names]
    if not wanted and DISCRETE_ROW not in names:
        return []
    engines = {k: SoftEngine(spec_for(model, k)) for k in sorted({k for k, _ in wanted} or {5})}
    gates = {k: check_against_naive_loop(engine, model) for k, engine in engines.items()}
    stock = stock_engine(model)
    rows = [engine_row(engines[k], stock, k, batch, gates[k]) for k, batch in wanted]
    if DISCRETE_ROW in names:
        engine = next(iter(engines.values()))
        pairs = interleaved(
            lambda: our_round(engine, DISCRETE_BATCH, thinking="discrete"), lambda: stock_round(stock, DISCRETE_BATCH)
        )
        ratio, measured = ratios(pairs)
        detail = f"{measured}; legs of {SECONDS:g} s; one more pass over the logits per token for its log-probability"
        rows.append(Row(DISCRETE_ROW, ratio, TARGETS[DISCRETE_BATCH], detail))
    return rows


def engine_row(engine: SoftEngine, stock: Any, num_candidates: int, batch: int, gate: str) -> Row:
    pairs = interleaved(lambda: our_round(engine, batch), lambda: stock_round(stock, batch))
    ratio, measured = ratios(pairs)
    # What cannot be avoided per token: one pass over the logits and a mixture of K rows.
    extra = VOCABULARY + 2 * num_candidates * HIDDEN
    model_flops = 2 * (LAYERS * (HIDDEN * HIDDEN * 3 + 3 * HIDDEN * 1376) + VOCABULARY * HIDDEN)
    floor = f"floor: {extra / 1e3:.0f} k extra operations on {model_flops / 1e6:.0f} MFLOP per token"
    detail = f"{measured}; legs of {SECONDS:g} s; {gate}; {floor}"
    return Row(f"soft_decode/k{num_candidates}/b{batch}", ratio, TARGETS[batch], detail)


def stock_engine(model: Path) -> Any:
    """vLLM as it comes: its own architecture, worker, scheduler and front end."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    spec = spec_for(model, 5)
    os.environ |= engine_environment(spec)
    arguments = EngineArgs(
        model=str(model),
        dtype="float32",
        max_num_seqs=spec.max_num_seqs,
        max_model_len=spec.max_model_len,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        kv_cache_memory_bytes=spec.kv_cache_memory_bytes,
        block_size=spec.block_size,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    return LLMEngine.from_engine_args(arguments)


def our_round(
    engine: SoftEngine,
    batch: int,
    lengths: Sequence[int] | None = None,
    thinking: Literal["soft", "discrete"] = "soft",
) -> int:
    """Generate one batch; returns its number of tokens."""
    for length in lengths or [NEW_TOKENS] * batch:
        number = next(_numbers)
        settings = RequestSettings(max_new_tokens=length, thinking_budget=length)
        engine.add(RolloutRequest(f"{number}", "g", "p", 0, number, PROMPT, thinking), settings=settings)
    tokens = 0
    while engine.num_unfinished:
        tokens += sum(len(trajectory.response_ids) for trajectory in engine.step())
    return tokens


def stock_round(stock: Any, batch: int) -> int:
    from vllm import SamplingParams

    for _ in range(batch):
        number = next(_numbers)
        params = SamplingParams(temperature=1.0, max_tokens=NEW_TOKENS, ignore_eos=True, seed=number, detokenize=False)
        stock.add_request(f"{number}", {"prompt_token_ids": list(PROMPT)}, params)
    tokens = 0
    while stock.has_unfinished_requests():
        tokens += sum(len(output.outputs[0].token_ids) for output in stock.step() if output.finished)
    return tokens


@dataclass(frozen=True)
class Leg:
    """Tokens per second of one leg, by the clock on the wall and by the processor time of this process."""

    wall: float
    processor: float


def interleaved(
    first: Callable[[], int], second: Callable[[], int], *, pairs: int = PAIRS, seconds: float = SECONDS
) -> list[tuple[Leg, Leg]]:
    """Both in turns; each leg lasts at least `seconds`. One warm-up round each, unless a leg is one long round."""
    if seconds:
        first(), second()
    return [(leg(first, seconds), leg(second, seconds)) for _ in range(pairs)]


def leg(work: Callable[[], int], seconds: float) -> Leg:
    started, processor, tokens = time.perf_counter(), time.process_time(), 0
    while tokens == 0 or time.perf_counter() - started < seconds:
        tokens += work()
    return Leg(tokens / (time.perf_counter() - started), tokens / (time.process_time() - processor))


def ratios(pairs: Sequence[tuple[Leg, Leg]]) -> tuple[float, str]:
    """The median ratio of wall-clock rates, and a description with its interval and the ratio of processor rates
    (which neighbours on a shared machine disturb less)."""
    wall = [first.wall / second.wall for first, second in pairs]
    low, high = median_interval(wall)
    processor = statistics.median(first.processor / second.processor for first, second in pairs)
    rates = [statistics.median(pair[side].wall for pair in pairs) for side in (0, 1)]
    return statistics.median(wall), (
        f"median of {len(pairs)} pairs, interval [{low:.3f}, {high:.3f}], {processor:.3f} by processor time; "
        f"{rates[0]:.0f} over {rates[1]:.0f} tokens/s"
    )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Distribution-free interval of the median from order statistics, at least 95 % where there are values enough."""
    ordered = sorted(values)
    count = len(ordered)
    cumulative, drop = 0.5**count, 0
    while drop + 1 < count / 2:
        cumulative += 0.5**count * math.comb(count, drop + 1)
        if 2 * cumulative > 0.05:
            break
        drop += 1
    return ordered[drop], ordered[count - 1 - drop]


def check_against_naive_loop(engine: SoftEngine, model: Path) -> str:
    """Gate: what is measured must be right. Eight soft responses of 12 tokens, token by token."""
    from tests.rollout.conftest import Case, reference_case, reference_model, run
    from tests.rollout.test_soft_parity import assert_parity

    reference = reference_model(model)
    settings = RequestSettings(max_new_tokens=12, thinking_budget=12)
    requests = [RolloutRequest(f"gate{index}", "g", "p", index, index, PROMPT) for index in range(8)]
    cases: list[Case] = [reference_case(reference, engine.spec, request, settings) for request in requests]
    found = run(engine, cases)
    assert_parity(cases, found)
    assert all((trajectory.kinds[:-1] == Kind.SOFT).all() for trajectory in found.values())
    return "equal to the naive loop on 8 responses"


# --- against a transformers loop ------------------------------------------------------------------------------------


def loop_rows(model: Path, names: set[str]) -> list[Row]:
    """Equal lengths, where batching is free for the loop, and log-normal ones, where it is not."""
    wanted = LOOP_ROWS & names
    if not wanted:
        return []
    from tests.rollout.conftest import reference_model

    engine, reference = SoftEngine(spec_for(model, 5)), reference_model(model)
    rows = []
    if "soft_decode/loop_equal" in wanted:
        lengths = [NEW_TOKENS] * LOOP_BATCH
        ratio, measured = ratios(
            interleaved(lambda: our_round(engine, LOOP_BATCH), lambda: transformers_round(reference, lengths))
        )
        rows.append(
            Row("soft_decode/loop_equal", ratio, 1.0, f"batch {LOOP_BATCH}, {NEW_TOKENS} tokens each; {measured}")
        )
    if "soft_decode/loop_lognormal" in wanted:
        draws = np.random.default_rng(0).lognormal(np.log(32), 0.8, size=8 * LOOP_BATCH)
        lengths = [int(length) for length in np.clip(np.round(draws), 1, MAX_LENGTH)]
        static = sum(max(lengths[i : i + LOOP_BATCH]) * LOOP_BATCH for i in range(0, len(lengths), LOOP_BATCH))
        ratio, measured = ratios(
            interleaved(
                lambda: our_round(engine, 0, lengths),
                lambda: static_batches(reference, lengths),
                pairs=max(2, PAIRS // 2),
                seconds=0.0,
            )
        )
        what = f"512 requests, lengths {min(lengths)}-{max(lengths)}, {static / sum(lengths):.2f}x padding in the loop"
        rows.append(Row("soft_decode/loop_lognormal", ratio, 2.5, f"{what}; {measured}"))
    return rows


def static_batches(model: Any, lengths: Sequence[int]) -> int:
    return sum(
        transformers_round(model, lengths[begin : begin + LOOP_BATCH]) for begin in range(0, len(lengths), LOOP_BATCH)
    )


@torch.inference_mode()
def transformers_round(model: Any, lengths: Sequence[int]) -> int:
    """A static batch with a KV cache, to its longest member; the same sampler and mixture as the engine."""
    table = model.get_input_embeddings().weight
    batch = len(lengths)
    params = SoftTokenParams(max_candidates=5, censor_delta=1e-3)
    seeds = torch.arange(batch)
    embeds, cache = table[torch.tensor(PROMPT)].expand(batch, -1, -1), None
    for step in range(max(lengths)):
        output = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        drawn = sample_soft_tokens(output.logits[:, -1], params, CounterNoise(seeds, torch.full((batch,), step)))
        embeds = mix_embeddings(table, drawn.ids, drawn.weights)[:, None]
    return sum(lengths)
