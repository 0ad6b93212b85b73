"""What the demo trains: the chain task's files and a small model with a warm start, made locally and cached.

    random model --worked examples until the gate--> can add --mixed traces--> can add, but mostly guesses

The warm start has two phases because arithmetic is learned from careful traces only, while reinforcement learning needs
a policy that rarely uses it. The gate is on the first: a model that cannot add looks like a reinforcement-learning bug.

Invariant: a directory with `assets.json` is complete and was made by exactly the recipe, code and libraries of its
digest.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from orchestration.chain_task import ChainTask, Trace, TraceMixture, traces, write_questions, write_traces
from orchestration.config import Config
from orchestration.tiny_model import TinyModelShape, build_tiny_model, build_tokenizer
from reward.confinement import die_with_parent

logger = logging.getLogger(__name__)

ASSETS_ROOT = Path("outputs/demo-assets")
STAMP = "assets.json"
SOURCES = ("orchestration.chain_task", "orchestration.tiny_model", "orchestration.demo_assets", "learner.warm_start")
LIBRARIES = ("torch", "transformers", "tokenizers")
NUM_EVALUATION = 256
GATE_EXAMPLES = 256
GATE_SEED = 99
NUM_SAVED_TRACES = 1000
BUILD_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class WarmStartRecipe:
    """Numbers of the warm start; see `learner.warm_start`."""

    examples_direct_share: float = 0.1
    """Phase 1: learn to add."""
    habits_direct_share: float = 0.75
    """Phase 2: learn to guess."""
    batch: int = 128
    learning_rate: float = 4e-3
    steps: int = 300
    block_steps: int = 100
    max_steps: int = 1200
    min_accuracy: float = 0.96
    """Of residues after true prefixes; slips make 0.984 the ceiling."""
    habits_steps: int = 100
    habits_learning_rate: float = 2e-3


@dataclass(frozen=True, slots=True)
class DemoRecipe:
    """Everything that decides what the assets are."""

    seed: int
    task: ChainTask = field(default_factory=ChainTask)
    shape: TinyModelShape = field(default_factory=TinyModelShape)
    warm_start: WarmStartRecipe = field(default_factory=WarmStartRecipe)

    def digest(self) -> str:
        """Of this recipe, the code that follows it and the libraries that it runs on."""
        parts = [json.dumps(asdict(self), sort_keys=True), *(f"{name} {version(name)}" for name in LIBRARIES)]
        content = hashlib.blake2b("\n".join(parts).encode(), digest_size=16)
        for module in SOURCES:
            content.update(_source(module))
        return content.hexdigest()


def assets_dir(seed: int) -> Path:
    """Where the assets of a seed lie, relative to the working directory."""
    return ASSETS_ROOT / f"seed-{seed}"


Build = Callable[[DemoRecipe, Path], dict[str, Any]]


def build_in_child(recipe: DemoRecipe, directory: Path) -> dict[str, Any]:
    """`build_assets` in a process of its own: the driver stays free of torch."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=_prepare_child, initargs=(os.getpid(),)
    ) as pool:
        return pool.submit(build_assets, recipe, directory).result(timeout=BUILD_TIMEOUT_S)


def ensure_assets(recipe: DemoRecipe, directory: Path, build: Build = build_in_child) -> dict[str, Any]:
    """Build the assets unless `directory` holds them already; returns their stamp.

    Stamp: {digest, reused, seconds, steps, accuracy}. Moved into place whole. Raises what the build raised,
    `WarmStartError` above all; what was there before stays.
    """
    digest = recipe.digest()
    stamp = _read_stamp(directory)
    if stamp.get("digest") == digest:
        return {**stamp, "reused": True}
    logger.info("making the model and its data in %s: once, about a minute", directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        stamp = {"digest": digest, **build(recipe, aside)}
        (aside / STAMP).write_text(json.dumps(stamp, indent=2), encoding="utf-8")
        if directory.exists():
            shutil.rmtree(directory)
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {**stamp, "reused": False}


def ensure_assets_of(config: Config) -> None:
    """Build the demo's assets where a recipe names them and they are missing, so that `train` needs no `demo` first."""
    seed = missing_assets_of(config)
    if seed is not None:
        ensure_assets(DemoRecipe(seed), Path(config.model.path).parent)


def missing_assets_of(config: Config) -> int | None:
    """The seed of the demo's assets that a recipe names and that are not made yet."""
    path = Path(config.model.path)
    directory = path.parent
    if path.name != "model" or directory.parent != ASSETS_ROOT or _read_stamp(directory):
        return None
    prefix, _, seed = directory.name.partition("-")
    return int(seed) if prefix == "seed" and seed.isdigit() else None


def build_assets(recipe: DemoRecipe, directory: Path) -> dict[str, Any]:
    """Write `train.jsonl`, `held_out.jsonl`, `traces.jsonl` and `model/`; returns what the warm start did."""
    from learner.warm_start import Gate, warm_start

    write_questions(recipe.task, directory, num_evaluation=min(NUM_EVALUATION, _num_held_out(recipe.task)))
    numbers = recipe.warm_start
    habits = list(
        itertools.islice(_stream(recipe, TraceMixture(numbers.habits_direct_share), phase=2), NUM_SAVED_TRACES)
    )
    write_traces(directory / "traces.jsonl", habits)
    stages = [directory / name for name in ("untrained", "worked-examples", "model")]
    build_tiny_model(stages[0], recipe.shape, recipe.seed)
    encode = _Encoder()
    gate_traces = itertools.islice(traces(recipe.task, TraceMixture(0.0), GATE_SEED, held_out=True), GATE_EXAMPLES)
    judged = [(*encode(trace), encode.residues(trace)) for trace in gate_traces]
    learned = warm_start(
        stages[0],
        stages[1],
        map(encode, _stream(recipe, TraceMixture(numbers.examples_direct_share), phase=1)),
        numbers.steps,
        numbers.batch,
        numbers.learning_rate,
        recipe.seed,
        Gate(judged, numbers.min_accuracy, numbers.block_steps, numbers.max_steps),
    )
    final = warm_start(
        stages[1],
        stages[2],
        map(encode, _stream(recipe, TraceMixture(numbers.habits_direct_share), phase=2)),
        numbers.habits_steps,
        numbers.batch,
        numbers.habits_learning_rate,
        recipe.seed,
        Gate(judged, 0.0),
    )
    for stage in stages[:2]:
        shutil.rmtree(stage)
    return {
        "recipe": asdict(recipe),
        "seconds": round(learned.seconds + final.seconds, 1),
        "steps": learned.steps + final.steps,
        "accuracy": final.accuracy,
    }


def _prepare_child(parent_pid: int) -> None:
    die_with_parent(parent_pid)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from orchestration.logs import configure

    configure("warm start")
    torch.set_num_threads(1)  # matrices this small are slower on two
    disable_progress_bar()


class _Encoder:
    """Traces as (prompt ids, response ids) of the tiny model's tokenizer."""

    def __init__(self) -> None:
        self._tokenizer = build_tokenizer()

    def __call__(self, trace: Trace) -> tuple[Sequence[int], Sequence[int]]:
        chat = [{"role": "user", "content": trace.question}]
        prompt = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        response = self._tokenizer(trace.response, add_special_tokens=False).input_ids
        return prompt, [*response, self._tokenizer.eos_token_id]

    def residues(self, trace: Trace) -> Sequence[bool]:
        """Which response positions are running residues."""
        _, response = self(trace)
        return [1 <= position <= trace.num_residues for position in range(len(response))]


def _stream(recipe: DemoRecipe, mixture: TraceMixture, *, phase: int) -> Iterator[Trace]:
    return traces(recipe.task, mixture, seed=10 * recipe.seed + phase)


def _num_held_out(task: ChainTask) -> int:
    return len(task.questions(held_out=True))


def _source(module: str) -> bytes:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_bytes()


def _read_stamp(directory: Path) -> dict[str, Any]:
    try:
        stamp: dict[str, Any] = json.loads((directory / STAMP).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return stamp
