"""Engines and reference rollouts shared by the tests of this folder: starting either is what costs time."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.engine import EngineSpec, RequestSettings, SoftEngine
from rollout.engine_spec import resolve_settings
from rollout.request import RolloutRequest
from rollout.trajectory import Trajectory
from tests.conftest import build_tiny_model
from tests.rollout.naive_loop import Position, naive_loop

END_OF_THINKING = 4
END_OF_SEQUENCE = 2
DELTA = 1e-3
MAX_CANDIDATES = 8


def base_spec(model: Path, **changes: Any) -> EngineSpec:
    """Small steps (chunked prefill), small blocks, prefix caching on."""
    spec = EngineSpec(
        model_path=str(model),
        dtype="float32",
        max_num_seqs=16,
        max_model_len=192,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=16 << 20,
        enforce_eager=True,
        block_size=32,
        end_of_thinking_id=END_OF_THINKING,
        soft={"max_candidates": MAX_CANDIDATES, "top_k": 5, "censor_delta": DELTA},
        max_new_tokens=96,
        thinking_budget=64,
    )
    return replace(spec, **changes)


EngineFactory = Callable[..., AbstractContextManager[SoftEngine]]


@pytest.fixture(scope="session")
def parity_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, with an end of thinking and an end of sequence that come up while it thinks."""
    from transformers import AutoModelForCausalLM

    directory = build_tiny_model(tmp_path_factory.mktemp("parity-model"), tied=False)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.lm_head.weight[END_OF_THINKING] *= 2.0
        model.lm_head.weight[END_OF_SEQUENCE] *= 1.5
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def start_engine(parity_model_dir: Path) -> Iterator[EngineFactory]:
    """`with start_engine(**spec_changes) as engine`; several may live in this process.

    They are not shut down before the session ends: that (and their collection as garbage) would end the distributed
    state of the process, which all of them share.
    """
    alive: list[SoftEngine] = []

    @contextmanager
    def start(model: Path = parity_model_dir, **changes: Any) -> Iterator[SoftEngine]:
        alive.append(SoftEngine(base_spec(model, **changes)))
        yield alive[-1]

    yield start
    # The end of each engine thaws and walks everything that a session of tests has left, three times: half a minute for
    # what the end of this process frees anyway.
    gc.disable()
    gc.collect = lambda generation=2: 0


@pytest.fixture(scope="session")
def engine(start_engine: EngineFactory) -> Iterator[SoftEngine]:
    """The engine that tests share when they need no special one."""
    with start_engine() as shared:
        yield shared


@pytest.fixture(scope="session")
def parity_model(parity_model_dir: Path) -> Any:
    return reference_model(parity_model_dir)


def reference_model(directory: Path) -> Any:
    """The same checkpoint in transformers, without any fused attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@dataclass(frozen=True)
class Case:
    """One request with its settings and what the naive loop makes of it."""

    request: RolloutRequest
    settings: RequestSettings
    expected: tuple[Position, ...]


def mixed_cases(model: Any, spec: EngineSpec, *, count: int, seed: int) -> list[Case]:
    """Requests that differ in every setting: prompts of 1 to 90 tokens, greedy and drawn, soft and discrete."""
    choose = random.Random(seed)
    cases = []
    for index in range(count):
        prompt = tuple(choose.randrange(5, 64) for _ in range(choose.choice((1, 3, 20, 40, 90))))
        thinking = "soft" if choose.random() < 0.8 else "discrete"
        request = RolloutRequest(
            f"g{index}/0", f"g{index}", f"p{index}", 0, choose.randrange(1 << 62), prompt, thinking
        )
        settings = RequestSettings(
            temperature=choose.choice((0.0, 0.7, 1.0, 1.0, 1.6)),
            top_k=choose.randint(1, MAX_CANDIDATES),
            top_p=choose.choice((0.8, 0.95, 1.0)),
            min_p=choose.choice((0.0, 0.0, 0.1)),
            gumbel_temperature=choose.choice((0.1, 0.5, 1.0)),
            noise_scale=choose.choice((0.5, 1.0, 1.0)),
            thinking_budget=choose.choice((2, 8, 20, 40)),
            max_new_tokens=choose.choice((6, 24, 48)),
            answer_temperature=choose.choice((0.0, 0.7, 1.0)),
            answer_top_p=choose.choice((0.9, 1.0)),
            answer_top_k=choose.choice((-1, 10)),
        )
        cases.append(reference_case(model, spec, request, settings))
    return cases


def reference_case(model: Any, spec: EngineSpec, request: RolloutRequest, settings: RequestSettings) -> Case:
    expected = naive_loop(
        model,
        request.prompt_ids,
        request.seed,
        resolve_settings(spec, request, settings),
        thinks=request.thinking == "soft",
        end_id=spec.end_of_thinking_id or -1,
        stop_ids=(END_OF_SEQUENCE,),
        delta=spec.soft.get("censor_delta"),
        forbid_stop=spec.eos_while_thinking == "forbid",
        entropy_stop=None if spec.entropy_stop is None else (spec.entropy_stop, spec.entropy_stop_steps),
    )
    return Case(request, settings, tuple(expected))


def run(engine: SoftEngine, cases: Sequence[Case], *, between_steps: Any = None) -> dict[str, Trajectory]:
    """Generate all cases together; `between_steps(number)` is called before every step."""
    for case in cases:
        engine.add(case.request, settings=case.settings)
    finished: dict[str, Trajectory] = {}
    for number in range(20_000):
        if not engine.num_unfinished:
            return finished
        if between_steps is not None:
            between_steps(number)
        finished |= {trajectory.request_id: trajectory for trajectory in engine.step()}
    raise AssertionError("the engine did not finish in 20000 steps")
