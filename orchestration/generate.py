"""`softgrpo generate`: answers of a model to prompts, thinking in soft or discrete tokens; inference only.

    softgrpo generate --model outputs/demo/model --prompt "3 1 4 0 2 =" --trace
    softgrpo generate --model DIR --input prompts.jsonl --output answers.jsonl --samples 4 sampling.top_k=10

The engine of training runs in this process: no Ray, no DeepSpeed, no verifier. Input is JSONL with `prompt`,
`question`, `problem` or `messages` (and perhaps `id`), or plain text with one prompt per line. Answers appear as they
finish.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from orchestration import machine
from orchestration.arguments import positive
from orchestration.config import Config, ConfigError, apply_override, load_config, parse_config
from orchestration.model_facts import read_model_facts
from orchestration.plan import engine_spec
from orchestration.prompt_tokenizer import PromptTokenizer, end_of_thinking_id, resolve_model_dir, with_recipe_prompt
from orchestration.report_traces import KIND_NAMES, TokenText, token_texts
from orchestration.validate import Resolved
from rollout.engine import EngineSpec, engine_environment
from rollout.request import RolloutRequest, sample_seed
from rollout.trajectory import Kind, Trajectory

if TYPE_CHECKING:
    from rollout.engine import SoftEngine

logger = logging.getLogger(__name__)

PROMPT_FIELDS = ("prompt", "question", "problem")
CPU_CACHE_MB = 512
QUEUED_BATCHES = 2
"""Requests handed to the engine at once, in batches of `max_num_seqs`: a million prompts must not pile up there."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One thing to answer."""

    prompt_id: str
    messages: list[dict[str, str]]


def main(arguments: Sequence[str]) -> int:
    """The command; returns an exit code."""
    namespace = _parser().parse_intermixed_args(list(arguments))
    prompts = [Prompt(f"prompt-{i}", [_user(text)]) for i, text in enumerate(namespace.prompt)]
    if namespace.input is not None:
        prompts += read_prompts(namespace.input)
    if not prompts:
        raise ConfigError("no prompt: give --prompt TEXT or --input FILE")
    resolved, encoded = prepare(namespace.model, namespace.config, namespace.overrides, prompts, namespace.thinking)
    spec = engine_spec(resolved, initial_version=0)
    requests = list(make_requests(encoded, namespace.samples, namespace.thinking, resolved.config.seed))
    names = {prompt.prompt_id: prompt for prompt in prompts}
    assert resolved.model_dir is not None
    with _output(namespace.output) as output:
        for trajectory, texts in answers(spec, requests):
            record = answer_record(names[trajectory.prompt_id], trajectory, texts)
            if namespace.trace:
                record["trace"] = soft_trace(trajectory, token_texts(resolved.model_dir))
            output.write(json.dumps(record, ensure_ascii=False) + "\n")
            output.flush()
    return 0


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file; raises `ConfigError` naming the line that is none."""
    try:
        with path.open(encoding="utf-8") as file:  # unlike splitlines() it leaves U+2028 and its like in a line
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    prompts = [_parse_prompt(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt")
    ids = [prompt.prompt_id for prompt in prompts]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"{path}: ids repeat; leave `id` out to number the lines")
    return prompts


def prepare(
    model: str | None, config_file: Path | None, overrides: Sequence[str], prompts: Sequence[Prompt], thinking: str
) -> tuple[Resolved, list[tuple[str, tuple[int, ...]]]]:
    """The configuration for these prompts and their ids; without a recipe, responses get the room that the model has.

    Raises `ConfigError` for a model that is not here, a prompt that does not fit, or a soft model without an end of
    thinking.
    """
    if model is None and config_file is None:
        raise ConfigError("no model: give --model DIR, or --config FILE")
    config = load_config(config_file, overrides) if config_file else _default_config(str(model), overrides)
    if model is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": model})})
    directory = resolve_model_dir(config.model)
    if directory is None:
        raise ConfigError(f"--model {config.model.path}: not in the local cache; fetch it first")
    facts = read_model_facts(directory)
    tokenizer = PromptTokenizer(directory)
    chats = [with_recipe_prompt(prompt.messages, config.data) for prompt in prompts]
    encoded = list(zip((p.prompt_id for p in prompts), tokenizer.encode_chats(chats), strict=True))
    longest = max(len(ids) for _, ids in encoded)
    room = facts.max_positions - longest
    given = config_file is not None or any(override.startswith("sampling.max_new_tokens=") for override in overrides)
    tokens = config.sampling.max_new_tokens if given else min(config.sampling.max_new_tokens, room)
    if tokens > room or tokens < 1:
        raise ConfigError(
            f"the longest prompt has {longest} tokens and sampling.max_new_tokens={config.sampling.max_new_tokens}; "
            f"{config.model.path} has {facts.max_positions} positions: shorten one of them"
        )
    fitted = config.model_copy(
        update={
            "data": config.data.model_copy(update={"max_prompt_tokens": longest}),
            "sampling": config.sampling.model_copy(update={"max_new_tokens": tokens}),
        }
    )
    end_id = None
    if thinking == "soft":
        end_id = end_of_thinking_id(config.model, tokenizer, facts.vocab_size, trains=False)
    return Resolved(fitted, directory, facts, tokenizer, end_id, None, (), (), ()), encoded


def make_requests(
    encoded: Sequence[tuple[str, tuple[int, ...]]], samples: int, thinking: str, seed: int
) -> Iterator[RolloutRequest]:
    """One request per prompt and sample, with seeds that depend on both and on the run's seed only."""
    for prompt_id, ids in encoded:
        for index in range(samples):
            yield RolloutRequest(
                request_id=f"{prompt_id}/{index}",
                group_id=prompt_id,
                prompt_id=prompt_id,
                sample_index=index,
                seed=sample_seed(seed, f"generate/{prompt_id}", 0, index),
                prompt_ids=ids,
                thinking="discrete" if thinking == "discrete" else "soft",
            )


def answers(spec: EngineSpec, requests: Sequence[RolloutRequest]) -> Iterator[tuple[Trajectory, tuple[str, str]]]:
    """Trajectories as they finish, with (response text, answer text)."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for answers
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.update(engine_environment(spec))
    from rollout.engine import SoftEngine

    engine: SoftEngine = SoftEngine(spec)
    waiting = iter(requests)
    left = len(requests)
    try:
        while left:
            while engine.num_unfinished < QUEUED_BATCHES * spec.max_num_seqs and (request := next(waiting, None)):
                engine.add(request)
            for trajectory in engine.step():
                left -= 1
                yield trajectory, engine.decode(trajectory)
    finally:
        engine.shutdown()


def answer_record(prompt: Prompt, trajectory: Trajectory, texts: tuple[str, str]) -> dict[str, Any]:
    """One line of output."""
    return {
        "id": prompt.prompt_id,
        "sample": trajectory.sample_index,
        "prompt": prompt.messages[-1]["content"],
        "response": texts[0],
        "answer": texts[1],
        "finish_reason": trajectory.finish_reason,
        "length": len(trajectory.response_ids),
        "soft_length": len(trajectory.weights),
        "seed": trajectory.seed,
    }


def soft_trace(trajectory: Trajectory, token_text: TokenText) -> list[dict[str, Any]]:
    """Positions in order; a soft one has its retained candidates by descending weight."""
    trace: list[dict[str, Any]] = []
    soft = 0
    for kind, token in zip(trajectory.kinds.tolist(), trajectory.response_ids.tolist(), strict=True):
        position: dict[str, Any] = {"kind": KIND_NAMES[Kind(kind)], "id": token, "token": token_text(token)}
        if kind == Kind.SOFT:
            columns = zip(
                trajectory.candidate_ids[soft].tolist(),
                trajectory.weights[soft].tolist(),
                trajectory.candidate_logprobs[soft].tolist(),
                strict=True,
            )
            position["candidates"] = [
                {"id": i, "token": token_text(i), "weight": round(w, 6), "probability": round(math.exp(log_p), 6)}
                for i, w, log_p in columns
                if w > 0 or log_p > -math.inf
            ]
            soft += 1
        trace.append(position)
    return trace


def _default_config(model: str, overrides: Sequence[str]) -> Config:
    """A recipe for inference: fp32 and a small cache without a GPU, one GPU where there is one."""
    gpus = min(1, machine.num_gpus())
    tree: dict[str, Any] = {
        "name": "generate",
        "model": {"path": model, "dtype": "bfloat16" if gpus else "float32"},
        "data": {"train": {"path": "none"}},
        "rollout": {"num_gpus": gpus, "kv_cache_memory_mb": None if gpus else CPU_CACHE_MB},
    }
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, "command line")


def _parse_prompt(path: Path, number: int, line: str) -> Prompt:
    if path.suffix not in (".jsonl", ".json"):
        return Prompt(f"line-{number}", [_user(line)])
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}:{number}: not JSON ({error}); give one object per line") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path}:{number}: expected an object, found {type(record).__name__}")
    prompt_id = str(record.get("id", f"line-{number}"))
    if isinstance(record.get("messages"), list) and record["messages"]:
        return Prompt(prompt_id, [_parse_message(message, f"{path}:{number}") for message in record["messages"]])
    for name in PROMPT_FIELDS:
        if isinstance(record.get(name), str) and record[name].strip():
            return Prompt(prompt_id, [_user(record[name])])
    raise ConfigError(f"{path}:{number}: no prompt; give one of {', '.join(PROMPT_FIELDS)} or messages")


def _parse_message(message: Any, where: str) -> dict[str, str]:
    fields = message if isinstance(message, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ConfigError(f"{where}: message {message!r:.80} needs role and content, both texts")
    return {"role": role, "content": content}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _output(path: Path | None) -> Any:
    output: IO[str] | nullcontext[IO[str]]
    try:
        output = nullcontext(sys.stdout) if path is None else path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}") from None
    return output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="softgrpo generate", description="Answer prompts with a model.")
    parser.add_argument("--model", metavar="DIR", help="checkpoint directory or cached hub name")
    parser.add_argument("--config", type=Path, metavar="FILE", help="take model, sampling and engine from a recipe")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt (may be repeated)")
    parser.add_argument("--input", type=Path, metavar="FILE", help="JSONL, or text with one prompt per line")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSONL of answers (default: standard output)")
    parser.add_argument("--thinking", choices=("soft", "discrete"), default="soft")
    parser.add_argument("--samples", type=positive, default=1, help="answers per prompt (default 1)")
    parser.add_argument("--trace", action="store_true", help="add every position, soft ones with their candidates")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in sampling.temperature=0.6 seed=1")
    return parser
