"""`softgrpo demo`: build a small model and its task, train it with the ordinary training entry, show what changed.

    assets (cached) --> run_training(configs/demo.yaml): evaluate, train, evaluate --> table, picture, MLflow command

`--compare` trains three more arms from the same warm start: discrete GRPO, the likelihood of the released code, and a
control that leaves the soft positions out of the loss (it must not learn). The task says nothing about which of them is
better on real problems, and the table does not either.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from orchestration.config import Config, ConfigError, load_config
from orchestration.demo_assets import DemoRecipe, assets_dir, ensure_assets
from orchestration.machine import memory_bytes
from orchestration.metrics_log import read_metrics
from orchestration.plots import plot_curves
from orchestration.redaction import redact_text
from orchestration.run_state import RunDirectory

logger = logging.getLogger(__name__)

RECIPE = "demo.yaml"
SECOND_ACTOR_BYTES = 8 * 2**30
"""Memory of a machine on which two engines fit beside the learner."""
NOTE = (
    "A task this small leaves nothing to superpose: it shows that an arm's gradient works, not which arm is better on "
    "real problems."
)


@dataclass(frozen=True, slots=True)
class Arm:
    """One run of the comparison, as changes to the demo's recipe."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()


SOFT = Arm("demo", "SofT-GRPO, censored likelihood")
COMPARED = (
    Arm("demo-discrete", "discrete GRPO", ("sampling.thinking=discrete",)),
    Arm(
        "demo-reference",
        "SofT-GRPO, likelihood of the released code",
        (
            "algorithm.likelihood=reference",
            "algorithm.old_log_density=recompute",  # a ratio to the engine's record would not be of this likelihood
            "sampling.noise_clip=[-1.5, 3.0]",
            "sampling.log_epsilon=1.0e-6",
        ),
    ),
    Arm("demo-control", "control: answer tokens only", ("algorithm.likelihood=none",)),
)


def main(arguments: Sequence[str] = ()) -> int:
    """Run the demo; returns an exit code of the command line."""
    namespace = _parser().parse_args(list(arguments))
    started = time.monotonic()
    arms = (SOFT, *COMPARED) if namespace.compare else (SOFT,)
    planned = [(arm, arm_config(arm, namespace.seed, namespace.overrides)) for arm in arms]
    recipe = DemoRecipe(namespace.seed)
    stamp = ensure_assets(recipe, assets_dir(namespace.seed))
    made = "reused" if stamp["reused"] else f"made in {stamp['seconds']:.0f} s"
    logger.info("warm start %s (%d updates, accuracy of a step %.3f)", made, stamp["steps"], stamp["accuracy"])
    done: list[tuple[Arm, Config]] = []
    for arm, config in planned:
        clear_earlier_run(config)
        code = _train(config)
        if code != 0:
            return code
        done.append((arm, config))
        plot_curves({arm.title: read_metrics(config.run_dir / "metrics.jsonl")}, _picture(config))
    print("\n".join(_closing_lines(done, time.monotonic() - started)))
    return 0


def arm_config(arm: Arm, seed: int, overrides: Sequence[str] = ()) -> Config:
    """The demo's recipe with the assets of a seed, the changes of an arm, and the user's."""
    assets = assets_dir(seed)
    changes = [
        f"name={arm.name}",
        f"seed={seed}",
        f"model.path={assets / 'model'}",
        f"data.train.path={assets / 'train.jsonl'}",
        f"data.evaluation=[{{path: {assets / 'held_out.jsonl'}, name: held-out}}]",
        *arm.overrides,
    ]
    if memory_bytes() < SECOND_ACTOR_BYTES:
        changes.append("rollout.num_actors=1")
    with as_file(files("configs") / RECIPE) as path:
        return load_config(path, [*changes, *overrides])


def clear_earlier_run(config: Config) -> None:
    """Remove the run that an earlier demo left in this place; refuses a directory that holds anything else."""
    directory = RunDirectory(config.run_dir)
    if not directory.path.exists():
        return
    with directory.lease():
        earlier = directory.path / "config.yaml"
        foreign = [path.name for path in directory.path.iterdir() if path.name != "driver.lock"]
        if foreign and not (earlier.is_file() and load_config(earlier).name == config.name):
            raise ConfigError(f"{directory.path}: not a run of the demo; move it away, or add output_dir=PLACE")
        for path in directory.path.iterdir():
            if path.name == "driver.lock":
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def results_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """One line per arm from their `summary.json`: Pass@1, Pass@16, mean length, before -> after, and seconds."""
    width = max(len("arm"), *(len(title) for title, _ in rows))
    lines = [f"{'arm':<{width}}  {'Pass@1':>15}  {'Pass@16':>15}  {'mean length':>15}  {'seconds':>7}"]
    for title, summary in rows:
        before, after = summary["before"], summary["after"]
        cells = [
            f"{before['pass@1']:.3f} -> {after['pass@1']:.3f}",
            f"{before['pass@16']:.3f} -> {after['pass@16']:.3f}",
            f"{before['mean_length']:.1f} -> {after['mean_length']:.1f}",
        ]
        lines.append(
            f"{title:<{width}}  " + "  ".join(f"{cell:>15}" for cell in cells) + f"  {summary['seconds']:>7.0f}"
        )
    return lines


def mlflow_command(config: Config) -> str:
    """The command that opens this run in MLflow's browser interface."""
    from orchestration.tracking import mlflow_store

    uri, artifacts = mlflow_store(config)
    if artifacts is None:
        return f"MLflow: {redact_text(uri)}"
    return shlex.join(["mlflow", "ui", "--backend-store-uri", uri])


def _train(config: Config) -> int:
    from orchestration.train import run_training

    return run_training(config, resume=False)


def _closing_lines(done: Sequence[tuple[Arm, Config]], seconds: float) -> list[str]:
    rows = [(arm.title, json.loads((config.run_dir / "summary.json").read_text())) for arm, config in done]
    questions = done[0][1].evaluation.limit
    lines = [
        "",
        *results_table(rows),
        f"({questions} held-out questions, {done[0][1].evaluation.samples} samples each)",
        "",
    ]
    picture = _picture(done[0][1])
    if len(done) > 1:
        picture = picture.with_name("compare.png")
        plot_curves({arm.title: read_metrics(config.run_dir / "metrics.jsonl") for arm, config in done}, picture)
        lines += [NOTE, ""]
    return [
        *lines,
        f"all of it took {seconds:.0f} s",
        f"curves   {picture}",
        f"tracking {mlflow_command(done[0][1])}",
        f"report   softgrpo report {done[0][1].run_dir}",
    ]


def _picture(config: Config) -> Path:
    return config.run_dir / "plots" / "curves.png"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="softgrpo demo", description="Train a small model until it visibly learns.")
    parser.add_argument("--seed", type=int, default=0, help="of the warm start and the run (default 0)")
    parser.add_argument(
        "--compare", action="store_true", help="also train discrete GRPO, the released likelihood and a control"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to configs/demo.yaml")
    return parser
