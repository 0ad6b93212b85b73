"""The `softgrpo` command line.

Invariants: the module of a command is imported only when that command runs, so `--help` and configuration errors need
no torch, vllm, deepspeed, transformers or mlflow. A command is a function `(arguments: Sequence[str]) -> int` that
parses its own arguments. Exit codes: 0 done, 1 error, 2 configuration error (never worth a retry), 75 stopped with a
checkpoint (resubmit with --resume).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_CONFIG = 2
EXIT_STOPPED = 75


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand: `target` is `module:function`, imported when the command runs."""

    name: str
    summary: str
    target: str

    def load(self) -> Callable[[Sequence[str]], int]:
        """Import the command."""
        module, _, function = self.target.partition(":")
        command: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
        return command


COMMANDS = (
    Command("train", "train a model from a recipe", "orchestration.cli:train"),
    Command("validate", "check a recipe, its data and its model; start nothing", "orchestration.cli:validate"),
    Command("demo", "train a small model on this machine until it visibly learns", "orchestration.demo:main"),
    Command(
        "evaluate", "evaluate a checkpoint on benchmarks, or compare two results", "orchestration.evaluate_command:main"
    ),
    Command("generate", "answer prompts with a model, in soft or discrete tokens", "orchestration.generate:main"),
    Command("grade", "grade existing responses through the same verifier as training", "orchestration.grade:main"),
    Command("report", "write one HTML page about a run and its evaluations", "orchestration.report:main"),
    Command("submit", "run a recipe as a Ray job", "orchestration.submit:main"),
    Command("scale", "change the rollout pool of a running run", "orchestration.scale:main"),
    Command("doctor", "say what would stop a run on this machine, and the fix", "orchestration.doctor:main"),
    Command("kuberay", "render and validate Kubernetes manifests", "orchestration.kuberay_command:main"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a configuration error is one message on stderr and exit code 2, without a traceback."""
    from orchestration.config import ConfigError

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _top_level_parser()
    namespace, rest = parser.parse_known_args(arguments[:1])
    if namespace.command is None:
        parser.print_help()
        return EXIT_CONFIG
    command = next(command for command in COMMANDS if command.name == namespace.command)
    assert not rest
    from orchestration.logs import configure
    from orchestration.redaction import redact_text

    configure("driver")
    try:
        return command.load()(arguments[1:])
    except ConfigError as error:
        print(redact_text(f"softgrpo {command.name}: {error}"), file=sys.stderr)
        return EXIT_CONFIG


def train(arguments: Sequence[str]) -> int:
    """`softgrpo train`: run the pipeline until done or stopped."""
    parser = recipe_parser("train", "Train a model from a recipe.")
    parser.add_argument("--resume", action="store_true", help="continue the run of this name from its last checkpoint")
    parser.add_argument(
        "--auto-resume", action="store_true", help="--resume if the run directory exists (for automatic retries)"
    )
    namespace = parser.parse_intermixed_args(arguments)
    from orchestration.config import load_config

    config = load_config(namespace.config, namespace.overrides)
    from orchestration.demo_assets import ensure_assets_of

    ensure_assets_of(config)
    from orchestration.run_state import RunDirectory
    from orchestration.train import run_training

    resume = namespace.resume or (namespace.auto_resume and RunDirectory(config.run_dir).is_run())
    return run_training(config, resume=resume)


def validate(arguments: Sequence[str]) -> int:
    """`softgrpo validate`: print what a recipe means on this machine; 2 if it could not run."""
    parser = recipe_parser("validate", "Check a recipe, its data and its model; start nothing.")
    namespace = parser.parse_intermixed_args(arguments)
    from orchestration.config import ConfigError, load_config
    from orchestration.demo_assets import missing_assets_of
    from orchestration.describe import describe
    from orchestration.validate import uses_local_cluster
    from orchestration.validate import validate as validate_config

    config = load_config(namespace.config, namespace.overrides)
    if missing_assets_of(config) is not None:
        raise ConfigError(
            f"model.path={config.model.path}: the demo's model and questions are not made yet; `softgrpo demo` makes "
            "them (and `softgrpo train` with this recipe does)"
        )
    print(describe(validate_config(config)))
    if not uses_local_cluster(config):
        from orchestration.cluster import describe_cluster

        print(describe_cluster(config))
    return EXIT_DONE


def recipe_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with `--config FILE [key=value ...]`, for every command that reads a recipe."""
    parser = argparse.ArgumentParser(prog=f"softgrpo {command}", description=description)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a YAML recipe (see configs/)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides, as in `steps=10 sampling.top_k=10` (values are YAML)",
    )
    return parser


def package_version() -> str:
    """The installed version; a clone on a cluster node is not installed and has none."""
    try:
        return version("softgrpo")
    except PackageNotFoundError:
        return "uninstalled"


def _top_level_parser() -> argparse.ArgumentParser:
    width = max(len(command.name) for command in COMMANDS) + 2
    listing = "\n".join(f"  {command.name:<{width}}{command.summary}" for command in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="softgrpo",
        description="Reinforcement learning of reasoning models in continuous thought.",
        epilog=f"commands:\n{listing}\n\n`softgrpo COMMAND --help` shows the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"softgrpo {package_version()}")
    parser.add_argument(
        "command",
        nargs="?",
        metavar="COMMAND",
        choices=[command.name for command in COMMANDS],
        help="what to do (listed below)",
    )
    return parser
