"""`softgrpo evaluate`: a checkpoint on benchmarks, decoded in several ways, with intervals; or two results compared.

    softgrpo evaluate --config configs/demo.yaml --checkpoint outputs/demo/model --arms soft,discrete,argmax
    softgrpo evaluate --compare outputs/a/evaluation outputs/b/evaluation

The engine is training's. Answers stream to Parquet; an interrupted evaluation goes on where it stopped when the same
command is given again, and refuses to go on with other settings.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.arguments import positive
from orchestration.config import Config, ConfigError, load_config, parse_config
from orchestration.dataset import dataset_digest
from orchestration.evaluate import EvaluationSettings, FinishedCall, Pools, evaluation_requests, run_calls
from orchestration.evaluation_arms import ARM_NAMES, EvaluationArm, make_arms
from orchestration.evaluation_results import compare_results, summarise
from orchestration.evaluation_store import FETCH_DEADLINE_S, PartWriter, ResultDirectory, missing_calls
from orchestration.validate import PromptSet, Resolved, validate

logger = logging.getLogger(__name__)

DIGEST_SAMPLES = 16
DIGEST_SAMPLE_BYTES = 2**20


def main(arguments: Sequence[str]) -> int:
    """The command; returns an exit code."""
    parser = _parser()
    namespace = parser.parse_intermixed_args(list(arguments))
    if namespace.compare:
        a, b = (_result_and_arm(text) for text in namespace.compare)
        print("\n".join(compare_results(a, b)))
        return 0
    if namespace.config is None:
        parser.error("give --config FILE, or --compare A B")
    recipe = load_config(namespace.config, namespace.overrides)
    names = namespace.arms.split(",")
    config = evaluation_config(recipe, namespace.checkpoint, namespace.benchmark, names)
    arms = make_arms(names, config, namespace.decoding, namespace.temperatures)
    resolved = validate(config, trains=False).require_complete()
    result = ResultDirectory(namespace.output or config.run_dir / "evaluation")
    result.open(
        _shared_settings(resolved, namespace.samples, namespace.decoding),
        {arm.name: arm.record(config) for arm in arms},
        {prompts.name: _benchmark_settings(prompts, config) for prompts in resolved.evaluation},
    )
    _answer_everything(resolved, arms, result, namespace.samples, namespace.traces)
    print("\n".join(summarise(result)))
    return 0


def evaluation_config(
    config: Config, checkpoint: Path | None, benchmarks: Sequence[str], arms: Sequence[str]
) -> Config:
    """The recipe as an evaluation needs it: this checkpoint, these benchmarks, no learner, no training data.

    Every arm but `discrete` thinks in soft tokens, whatever the recipe trains: the model must have an end of thinking.
    """
    tree = config.model_dump(mode="json")
    if checkpoint is not None:
        exported = checkpoint / "model"
        is_run = (exported / "config.json").is_file() and not (checkpoint / "config.json").is_file()
        tree["model"]["path"] = str(exported if is_run else checkpoint)
    if benchmarks:
        tree["data"]["evaluation"] = [_benchmark(text) for text in benchmarks]
    if not tree["data"]["evaluation"]:
        raise ConfigError("no benchmark: give --benchmark NAME=FILE, or data.evaluation in the recipe")
    tree["data"]["train"] = tree["data"]["evaluation"][0]
    tree["sampling"]["thinking"] = "discrete" if set(arms) == {"discrete"} else "soft"
    tree["pipeline"]["transport"] = "object_store"  # others need a learner, and no weights are sent
    tree["learner"] |= {"world_size": 1, "num_cpus": 0.01, "num_gpus": 0}
    tree["algorithm"] |= {"prompts_per_step": 1, "mini_batches": 1}
    return parse_config(tree, "evaluation")


def _answer_everything(
    resolved: Resolved, arms: Sequence[EvaluationArm], result: ResultDirectory, samples: int, traces: int
) -> None:
    """Run every call whose answers are not stored yet; starts no actor when there is none."""
    todo = []
    for prompts in resolved.evaluation:
        for arm in arms:
            calls = _calls(prompts, arm, resolved.config, samples)
            left = missing_calls(calls, result.done(prompts.name, arm.name))
            logger.info("%s, %s: %d of %d calls to do", prompts.name, arm.name, len(left), len(calls))
            if left:
                directory = result.path / prompts.name / arm.name
                todo.append((left, PartWriter(directory, traces, resolved.end_of_thinking_id)))
    if not todo:
        return
    from orchestration.cluster import connected
    from orchestration.inference_pools import inference_pools

    async def run() -> None:
        async with inference_pools(resolved) as pools:
            for calls, writer in todo:
                await answer(pools, calls, writer)
                logger.info("%s: %d calls done", writer.directory, len(calls))

    with connected(resolved.config, ("rollout", "verifier")):
        asyncio.run(run())


async def answer(pools: Pools, calls: Sequence[Any], writer: PartWriter) -> None:
    """Stream calls to disk; what is finished stays, whatever ends this."""
    import ray

    async def store(call: FinishedCall) -> None:
        batch = await asyncio.to_thread(ray.get, call.batch, timeout=FETCH_DEADLINE_S)
        writer.add(call, batch)

    try:
        await run_calls(pools, calls, store)
    finally:
        writer.flush()


def _calls(prompts: PromptSet, arm: EvaluationArm, config: Config, samples: int) -> list[Any]:
    settings = EvaluationSettings(
        samples=samples,
        thinking=arm.thinking,
        seed=config.seed,
        tag=f"evaluation {arm.name}",
        decoding=arm.settings,
    )
    rows = prompts.rows[: config.evaluation.limit]
    return [(row, part) for row in rows for part in evaluation_requests(row, prompts, settings)]


def _shared_settings(resolved: Resolved, samples: int, decoding: str) -> dict[str, Any]:
    config = resolved.config
    assert resolved.model_dir is not None
    return {
        "model": model_digest(resolved.model_dir),
        "dtype": config.model.dtype,
        "end_of_thinking_id": resolved.end_of_thinking_id,
        "samples": samples,
        "seed": config.seed,
        "decoding": decoding,
        "eos_while_thinking": config.sampling.eos_while_thinking,
        "prompt_suffix": config.data.prompt_suffix,
        "system_prompt": config.data.system_prompt,
    }


def _benchmark_settings(prompts: PromptSet, config: Config) -> dict[str, Any]:
    rows = prompts.rows[: config.evaluation.limit]
    return {"questions": len(rows), "digest": dataset_digest(rows), "rules": sorted({row.rule for row in rows})}


def model_digest(directory: Path) -> str:
    """Of the configuration, the tokenizer and samples of the weights: seconds even for large checkpoints."""
    content = hashlib.blake2b(digest_size=12)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        path = directory / name
        content.update(path.read_bytes() if path.is_file() else b"")
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        content.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(DIGEST_SAMPLES):
                file.seek(max(0, size - DIGEST_SAMPLE_BYTES) * sample // (DIGEST_SAMPLES - 1))
                content.update(file.read(DIGEST_SAMPLE_BYTES))
    return content.hexdigest()


def _benchmark(text: str) -> dict[str, str]:
    name, equals, path = text.partition("=")
    return {"name": name, "path": path} if equals else {"path": text}


def _result_and_arm(text: str) -> tuple[ResultDirectory, str | None]:
    path, colon, arm = text.rpartition(":")
    if colon and not Path(text).exists():
        return ResultDirectory(Path(path)), arm
    return ResultDirectory(Path(text)), None


def _temperatures(text: str) -> list[float]:
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 <= value < math.inf for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers with commas, as in 0.6,0.8,1.0; 0 is greedy")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softgrpo evaluate", description="Evaluate a checkpoint on benchmarks, or compare two results."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a recipe: model, sampling, pools, benchmarks")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint or a run, not the recipe's model")
    parser.add_argument(
        "--benchmark", action="append", default=[], metavar="[NAME=]FILE", help="not the recipe's data.evaluation"
    )
    parser.add_argument("--arms", default="soft,discrete", help=f"of {', '.join(ARM_NAMES)} (default soft,discrete)")
    parser.add_argument("--samples", type=positive, default=16, help="responses per question (default 16)")
    parser.add_argument(
        "--decoding", choices=("matched", "own"), default="matched", help="the same settings for all arms (default)"
    )
    parser.add_argument(
        "--temperatures", type=_temperatures, default=[], metavar="T,T", help="every arm at each of these"
    )
    parser.add_argument("--traces", type=int, default=1, help="samples per question that keep their soft tokens (1)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: evaluation/ in the recipe's run directory")
    parser.add_argument("--compare", nargs=2, metavar=("A[:ARM]", "B[:ARM]"), help="print b - a of two results")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    return parser
