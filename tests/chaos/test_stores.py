"""Disks and object stores without room (fault matrix rows 15 to 17), weights that broke (21), a cleaned /tmp (25)."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from orchestration.checkpoints import damage
from orchestration.metrics_log import RETRY_EVERY_S, read_metrics
from orchestration.run_state import RunDirectory, load_state
from orchestration.tiny_model import TinyModelShape, build_tiny_model
from tests.chaos.ballast import Ballast, store_stats
from tests.chaos.faults import balanced, hit, wait_for_replacement
from tests.chaos.small_disk import fill, small_disk
from tests.end_to_end.recipes import Run, make_inputs, recipe

pytestmark = [pytest.mark.slow, pytest.mark.chaos]


VERSION_BYTES = 9 * 2**20
"""At least, of the larger model: more than what Ray sends inside a message, and no more than ten fit the store."""
STORE_BYTES = 100 * 2**20
BUSY_S = 480.0
"""For a start, and four of the learner, on a machine that has other things to do."""


@pytest.fixture(scope="module")
def large_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose versions fill the store of a node within a few steps, unless they are released."""
    directory = make_inputs(tmp_path_factory.mktemp("large"))
    shutil.rmtree(directory / "model")
    build_tiny_model(directory / "model", TinyModelShape(intermediate_size=4096), seed=0)
    assert (directory / "model" / "model.safetensors").stat().st_size > VERSION_BYTES
    return directory


@contextmanager
def cluster_with_store(**options: Any) -> Iterator[tuple[Cluster, Any]]:
    """A head without work and one node for everything, with a small object store; cluster and node."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        node = cluster.add_node(num_cpus=8, object_store_memory=STORE_BYTES, **options)
        ray.init(address=cluster.address, namespace="ballast", log_to_driver=False)
        yield cluster, node
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)


def large_recipe(inputs: Path, run_dir: Path, cluster: Cluster, **changes: Any) -> Path:
    """Batches that lie in the store too, not inside the messages."""
    return recipe(
        inputs,
        run_dir,
        cluster__address=cluster.address,
        algorithm__group_size=16,
        sampling__max_new_tokens=64,
        sampling__max_thinking_tokens=48,
        tracking__mlflow=False,
        **changes,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def newest_step(run: Run) -> int:
    """Step of the newest whole checkpoint; 0 without one."""
    checkpoint = RunDirectory(run.run_dir).latest_checkpoint()
    return load_state(checkpoint).step if checkpoint else 0


def test_a_full_disk_while_checkpointing(inputs: Path, tmp_path: Path) -> None:
    """Row 17: alarms while there is no room, a checkpoint as soon as there is some; the last one is kept."""
    with small_disk(tmp_path / "disk", size_mb=32) as disk:
        config = recipe(
            inputs, disk / "run", steps=5000, checkpoint__every_steps=5, tracking__mlflow=False, learner__world_size=2
        )
        run = Run(shutil.move(config, tmp_path / "run.yaml"))  # its output lies beside it
        run.wait_until(lambda: newest_step(run) >= 5, "a first checkpoint")
        ballast = fill(disk)
        before = newest_step(run)
        run.wait_until(lambda: "no checkpoint of step" in run.tail(), "the alarm")
        assert newest_step(run) == before, "the checkpoint before is still there and whole"
        ballast.unlink()
        run.wait_until(lambda: newest_step(run) > before, "a checkpoint after there is room again")
        time.sleep(2 * RETRY_EVERY_S)
        metrics = read_metrics(run.run_dir / "metrics.jsonl")
        assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1)), "a step's metrics were lost"
        assert sum(line.get("failures/unwritten_checkpoints", 0) for line in metrics) >= 1
        fill(disk)
        assert run.wait() == 1, run.tail()
        kept = newest_step(run)
        assert kept > before
        assert f"the last one is of step {kept}" in run.tail()
        assert "4 in a row: mend that, then --resume" in run.tail()


def test_an_object_store_that_is_nearly_full(large_inputs: Path, tmp_path: Path) -> None:
    """Row 15: old versions and trained batches are released, so the store stays small; without room Ray spills."""
    steps = 40
    with cluster_with_store() as (cluster, node):
        run = Run(large_recipe(large_inputs, tmp_path / "run", cluster, steps=steps))
        most = 0

        def look() -> bool:
            nonlocal most
            most = max(most, store_stats(node).object_store_bytes_used)
            return len(run.metrics()) >= 15

        run.wait_until(look, "step 15")
        assert 15 * VERSION_BYTES > STORE_BYTES, "the versions so far fill the store"
        assert 1.5 * VERSION_BYTES < most < 5 * VERSION_BYTES, "two versions, the batches, and one in the making"
        assert store_stats(node).spilled_bytes_total == 0

        ballast = Ballast.remote()
        ray.get(ballast.hold.remote(STORE_BYTES - VERSION_BYTES), timeout=60)
        reached = len(run.metrics())
        run.wait_for_step(reached + 5)
        assert store_stats(node).spilled_bytes_total > 0
        assert run.wait() == 0, run.tail()
        balanced(run, steps, groups_per_step=4)


def test_a_spill_disk_that_is_full(large_inputs: Path, tmp_path: Path) -> None:
    """Row 16: tried again while there is no room, gone on with after that; an end that names the disk."""
    with (
        small_disk(tmp_path / "spill", size_mb=48) as disk,
        cluster_with_store(object_spilling_directory=str(disk)) as (cluster, _),
    ):
        config = large_recipe(
            large_inputs, tmp_path / "run", cluster, steps=5000, checkpoint__every_steps=2, pipeline__sync_timeout_s=45
        )
        run = Run(config)
        run.wait_until(lambda: newest_step(run) >= 2, "a first checkpoint")
        ballast = Ballast.remote()
        assert ray.get(ballast.hold.remote(None), timeout=120) > STORE_BYTES // 2
        run.wait_until(lambda: "are full; make room there" in run.tail(), "the alarm")
        reached = len(run.metrics())
        ray.get(ballast.release.remote(), timeout=60)
        run.wait_for_step(reached + 4)
        assert run.metrics()[-1].get("failures/learner_restarts", 0) == 0
        assert run.metrics()[-1]["failures/rollout_restarts"] == 0

        ray.get(ballast.hold.remote(None), timeout=120)
        assert run.wait() == 1, run.tail()
        assert f"the object store of its node and {disk}" in run.tail()
        kept = newest_step(run)
        assert kept > 0
        assert f"failed; continue with --resume from step_{kept:06d}" in run.tail()


def test_a_temporary_folder_that_is_cleaned(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 25: nothing of ours lives there; of Ray's own folder the sockets must stay, its logs need not."""
    folder = Path(tempfile.mkdtemp(prefix="sg", dir="/tmp"))  # short: Ray's socket paths are limited to 107 bytes
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    try:
        steps = 30
        run = Run(recipe(inputs, tmp_path / "run", steps=steps, checkpoint__every_steps=5, rollout__num_actors=2))
        run.wait_for_step(3, BUSY_S)
        for path in folder.iterdir():
            if path.name != "ray":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for logs in folder.glob("ray/session_*/logs/*"):
            shutil.rmtree(logs) if logs.is_dir() else logs.unlink()
        dead = hit(run, "ray::RolloutActor")
        wait_for_replacement(run, "ray::RolloutActor", dead, count=2)
        assert run.wait(BUSY_S) == 0, run.tail()
        balanced(run, steps, groups_per_step=4)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_an_update_that_breaks_the_weights_is_never_published(inputs: Path, tmp_path: Path) -> None:
    """Row 21: an overflowing update, in the middle of a run: no actor serves it, the last checkpoint stays."""
    config = recipe(inputs, tmp_path / "run", steps=3, checkpoint__every_steps=3, tracking__mlflow=False)
    assert Run(config).wait(BUSY_S) == 0
    # Decoupled decay multiplies the weights by 1 - 1e43, which is minus infinity in fp32.
    run = Run(config, "--resume", "steps=6", "learner.learning_rate=1e37", "learner.weight_decay=1e6")
    assert run.wait(BUSY_S) == 1, run.tail()
    assert "tensors are not finite" in run.tail()
    assert "is not published" in run.tail()
    assert newest_step(run) == 3
    checkpoint = RunDirectory(run.run_dir).checkpoints / "step_000003"
    assert damage(checkpoint) is None
    assert [line["step"] for line in run.metrics()] == [1, 2, 3], "no step of broken weights was counted"
