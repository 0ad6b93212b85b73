"""Small real runs: a random tiny model on the chain task, started through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
START_DEADLINE_S = 240.0


def make_inputs(directory: Path) -> Path:
    """A random model and the chain task's questions; returns the directory."""
    from orchestration.chain_task import ChainTask, write_questions
    from orchestration.tiny_model import TinyModelShape, build_tiny_model

    build_tiny_model(directory / "model", TinyModelShape(), seed=0)
    write_questions(ChainTask(), directory, num_evaluation=16)
    return directory


def recipe(inputs: Path, run_dir: Path, **changes: Any) -> Path:
    """A YAML file of a run of a few small steps; `section__key=value` changes it."""
    tree: dict[str, Any] = {
        "name": "small",
        "output_dir": str(run_dir),
        "steps": 3,
        "model": {"path": str(inputs / "model"), "dtype": "float32"},
        "data": {"train": {"path": str(inputs / "train.jsonl")}, "max_prompt_tokens": 16},
        "sampling": {"max_new_tokens": 24, "max_thinking_tokens": 12},
        "rollout": {"max_num_seqs": 64, "kv_cache_memory_mb": 64, "enforce_eager": True},
        "algorithm": {"group_size": 4, "prompts_per_step": 4, "mini_batches": 2},
        "learner": {"learning_rate": 1e-4},
        "pipeline": {"max_staleness": 1},
        "tracking": {"trajectories_every": 1, "mlflow": False},
        "cluster": {"local_cpus": 8, "object_store_mb": 200},
    }
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    path = run_dir.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


class Run:
    """`python -m orchestration train` as a process of its own, in its own process group."""

    def __init__(self, config: Path, *arguments: str) -> None:
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
        self.run_dir = Path(tree["output_dir"])
        self._in_cluster_of_test = tree["cluster"].get("address") is not None
        self.log = config.with_suffix(f".{time.monotonic_ns()}.log")
        command = [sys.executable, "-m", "orchestration", "train", "--config", str(config), *arguments]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with self.log.open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, deadline_s: float = START_DEADLINE_S) -> int:
        """The exit code; kills the run and shows its log at the deadline."""
        try:
            return self.process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end after {deadline_s} s:\n{self.tail()}") from None

    def wait_for_step(self, step: int, deadline_s: float = START_DEADLINE_S) -> None:
        """Until metrics.jsonl has that step."""
        self.wait_until(lambda: len(self.metrics()) >= step, f"step {step}", deadline_s)

    def wait_until(self, condition: Any, what: str, deadline_s: float = START_DEADLINE_S) -> None:
        """Poll; fails with the log when the run ended or the deadline passed first."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"waited {deadline_s} s for {what}:\n{self.tail()}"
            time.sleep(0.1)

    def metrics(self) -> list[dict[str, Any]]:
        """Complete lines of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]

    def descendants(self) -> list[Any]:
        """All processes that the run has started, Ray's and ours; with a cluster of the test, all of that."""
        import psutil

        root = os.getpid() if self._in_cluster_of_test else self.process.pid
        return psutil.Process(root).children(recursive=True)

    def actors(self, title: str) -> list[Any]:
        """Worker processes whose title names this actor class (`ray::RolloutActor...`)."""
        return [child for child in self.descendants() if title in _title(child)]

    def kill(self) -> None:
        """SIGKILL to the driver alone: what a crash does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=10)

    def tail(self) -> str:
        """The end of the log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-6000:]


def _title(process: Any) -> str:
    import psutil

    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
