"""256 responses of 8,192 positions with 5 candidates, from the engine's arrays to the learner's tensors.

All go through Ray's object store and end with one flat tensor per column, as a packed micro-batch is cut from it: a
record batch has that layout, peers join their rows. Lists are timed on a sixteenth of the rows.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rollout.trajectory import Kind, Trajectory, columns, pack
from tests.benchmarks._cluster import private_ray
from tests.benchmarks._timing import best_ratio, interleaved
from tests.benchmarks.row import Row

RESPONSES, LENGTH, CANDIDATES, VOCABULARY = 256, 8192, 5, 151_936
SAMPLE = 16
"""Only every 16th response goes through nested lists."""
ROUNDS = 7
TENSORS = ("response_ids", "log_density", "candidate_ids", "candidate_logprobs", "noise", "weights")
Tensors = dict[str, torch.Tensor]


def responses() -> list[Trajectory]:
    """Thinking from the first position to the last but one."""
    generator = np.random.default_rng(0)
    soft = (LENGTH - 1, CANDIDATES)
    kinds = np.array([Kind.SOFT] * (LENGTH - 1) + [Kind.ENDED], np.uint8)
    found = []
    for index in range(RESPONSES):
        weights = generator.random(soft, np.float32)
        found.append(
            Trajectory(
                request_id=f"p{index // 8}@0/{index % 8}",
                group_id=f"p{index // 8}@0",
                prompt_id=f"p{index // 8}",
                sample_index=index % 8,
                seed=index,
                prompt_ids=np.arange(200, dtype=np.int32),
                response_ids=generator.integers(0, VOCABULARY, LENGTH, np.int32),
                kinds=kinds,
                versions=np.zeros(LENGTH, np.int64),
                log_density=generator.random(LENGTH, np.float32),
                candidate_ids=generator.integers(0, VOCABULARY, soft, np.int32),
                candidate_logprobs=-generator.random(soft, np.float32),
                noise=generator.random(soft, np.float32),
                weights=weights / weights.sum(axis=1, keepdims=True),
                censor_threshold=np.full(LENGTH - 1, np.nan, np.float32),
                finish_reason="stop",
                response_text="",
                answer_text="",
            )
        )
    return found


def arrays(trajectory: Trajectory) -> dict[str, np.ndarray]:
    """What a peer sends of one response."""
    fields = (field.name for field in dataclasses.fields(trajectory))
    return {name: getattr(trajectory, name) for name in fields if isinstance(getattr(trajectory, name), np.ndarray)}


def join(rows: list[dict[str, np.ndarray]]) -> Tensors:
    """One flat tensor per column from the rows of a peer."""
    return {name: torch.cat([torch.from_numpy(row[name]) for row in rows]) for name in TENSORS}


def views(batch: pa.RecordBatch) -> Tensors:
    """Ours: the flat tensors are in the batch."""
    parts = columns(batch)
    return {name: torch.from_numpy(parts.flat[name]) for name in TENSORS}


def stored(value: Any) -> Any:
    """What comes out of the object store."""
    import ray

    return ray.get(ray.put(value), timeout=60)


def ours(trajectories: list[Trajectory]) -> Tensors:
    """One record batch."""
    return views(stored(pack(trajectories)))


def by_ray_numpy(trajectories: list[Trajectory]) -> Tensors:
    """Ray's pickle-5 with every buffer out of band."""
    return join(stored([arrays(trajectory) for trajectory in trajectories]))


def by_pickle(trajectories: list[Trajectory]) -> Tensors:
    """pickle-5 into one byte string, every buffer in band."""
    rows = [arrays(trajectory) for trajectory in trajectories]
    return join(pickle.loads(stored(pickle.dumps(rows, protocol=5))))


def by_lists(trajectories: list[Trajectory]) -> Tensors:
    """Nested Python lists."""
    rows = stored([{name: array.tolist() for name, array in arrays(t).items()} for t in trajectories])
    dtypes = {"response_ids": np.int32, "candidate_ids": np.int32}
    return join([{name: np.array(row[name], dtypes.get(name, np.float32)) for name in TENSORS} for row in rows])


def equal(ours: Tensors, peer: Tensors) -> bool:
    """Whether all tensors are equal to the bit."""
    return all(torch.equal(peer[name], ours[name]) for name in TENSORS)


def run(names: set[str] | None) -> list[Row]:
    """Rows `trajectories/pickle5`, `/ray_numpy` and `/lists`."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    trajectories = responses()
    sample = trajectories[:: RESPONSES // SAMPLE]
    with private_ray(num_cpus=1, object_store_mb=1400):
        found = ours(trajectories)
        right = {
            "pickle5": equal(found, by_pickle(trajectories)),
            "ray_numpy": equal(found, by_ray_numpy(trajectories)),
            "lists": equal(ours(sample), by_lists(sample)),
        }
        total = sum(tensor.nbytes for tensor in found.values())
        del found
        source, target = np.full(total, 1, np.uint8), np.full(total, 2, np.uint8)  # zeros share one page
        seconds = interleaved(
            {
                "ours": lambda: ours(trajectories),
                "memcpy": lambda: np.copyto(target, source),
                "pickle5": lambda: by_pickle(trajectories),
                "ray_numpy": lambda: by_ray_numpy(trajectories),
            },
            ROUNDS,
        )
        start = time.perf_counter()
        by_lists(sample)
        seconds["lists"] = [(time.perf_counter() - start) * RESPONSES / SAMPLE]
    rows = []
    for name, target_ratio in (("pickle5", 10.0), ("ray_numpy", 0.5), ("lists", 1e3)):
        detail = (
            f"{name} {1e3 * min(seconds[name]):.0f} ms, ours {1e3 * min(seconds['ours']):.0f} ms for "
            f"{total / 1e6:.0f} MB, floor (memcpys into columns and into the store) "
            f"{2e3 * min(seconds['memcpy']):.0f} ms; tensors {'equal to the bit' if right[name] else 'DIFFER'}"
        )
        ratio = best_ratio(seconds[name], seconds["ours"])
        rows.append(Row(f"trajectories/{name}", ratio, target_ratio, detail, right=right[name]))
    return [row for row in rows if names is None or row.name in names]
