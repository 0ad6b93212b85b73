"""256 responses of 8,192 positions with 5 candidates, from the engine's arrays to the learner's tensors.

Ours goes through Ray's object store as one record batch. Peers start from the same arrays: in-band pickle-5 of the
rows, Ray's out-of-band NumPy, and nested lists (what engines return; a sixteenth of the rows, scaled up).
"""

from __future__ import annotations

import dataclasses
import pickle
import time
import warnings
from collections.abc import Callable

import numpy as np
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
Tensors = dict[str, list[torch.Tensor]]


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


def to_tensors(rows: list[dict[str, np.ndarray]]) -> Tensors:
    """One tensor per response and column, sharing memory."""
    return {name: [torch.from_numpy(row[name]) for row in rows] for name in TENSORS}


def by_arrow(trajectories: list[Trajectory]) -> dict[str, torch.Tensor]:
    """Ours: flat tensors of the whole batch, cut by offsets that are at hand."""
    import ray

    reference = ray.put(pack(trajectories))
    parts = columns(ray.get(reference, timeout=60))
    return {name: torch.from_numpy(parts.flat[name]) for name in TENSORS}


def by_ray_numpy(trajectories: list[Trajectory]) -> Tensors:
    """Ray's pickle-5 with every buffer out of band."""
    import ray

    return to_tensors(ray.get(ray.put([arrays(trajectory) for trajectory in trajectories]), timeout=60))


def by_pickle(trajectories: list[Trajectory]) -> Tensors:
    """pickle-5 into one byte string, as a queue or a socket does it."""
    rows = [arrays(trajectory) for trajectory in trajectories]
    return to_tensors(pickle.loads(pickle.dumps(rows, protocol=5)))


def by_lists(trajectories: list[Trajectory]) -> Tensors:
    """Nested Python lists."""
    rows = [{name: array.tolist() for name, array in arrays(t).items()} for t in trajectories]
    rows = pickle.loads(pickle.dumps(rows, protocol=5))
    dtypes = {"response_ids": torch.int32, "candidate_ids": torch.int32}
    return {name: [torch.tensor(row[name], dtype=dtypes.get(name, torch.float32)) for row in rows] for name in TENSORS}


def equal(ours: dict[str, torch.Tensor], peers: Tensors) -> bool:
    """Whether a peer's rows end to end are our flat tensors, to the bit."""
    return all(
        torch.equal(torch.cat(peers[name]), ours[name][: sum(len(row) for row in peers[name])]) for name in TENSORS
    )


def run(names: set[str] | None) -> list[Row]:
    """Rows `trajectories/pickle5`, `/ray_numpy` and `/lists`."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    with private_ray(num_cpus=1, object_store_mb=1400):
        trajectories = responses()
        ours = by_arrow(trajectories)
        peers: dict[str, Callable[[list[Trajectory]], Tensors]] = {"pickle5": by_pickle, "ray_numpy": by_ray_numpy}
        right = {name: equal(ours, peer(trajectories)) for name, peer in peers.items()}
        total = sum(tensor.nbytes for tensor in ours.values())
        source, target = np.full(total, 1, np.uint8), np.full(total, 2, np.uint8)  # zeros share one page
        seconds = interleaved(
            {
                "ours": lambda: by_arrow(trajectories),
                "memcpy": lambda: np.copyto(target, source),
                **{name: lambda peer=peer: peer(trajectories) for name, peer in peers.items()},
            },
            ROUNDS,
        )
        start = time.perf_counter()
        lists = by_lists(trajectories[:: RESPONSES // SAMPLE])
        seconds["lists"] = [(time.perf_counter() - start) * RESPONSES / SAMPLE] * ROUNDS
        right["lists"] = equal(by_arrow(trajectories[:: RESPONSES // SAMPLE]), lists)
    floor = min(seconds["memcpy"])
    rows = []
    for name, target_ratio in (("pickle5", 10.0), ("ray_numpy", 0.5), ("lists", 1000.0)):
        ratio = best_ratio(seconds[name], seconds["ours"]) if right[name] else 0.0
        detail = (
            f"{name} {1e3 * min(seconds[name]):.0f} ms, ours {1e3 * min(seconds['ours']):.0f} ms for "
            f"{total / 1e6:.0f} MB, floor (memcpy) {1e3 * floor:.0f} ms; "
            f"tensors {'equal to the bit' if right[name] else 'DIFFER'}"
        )
        rows.append(Row(f"trajectories/{name}", ratio, target_ratio, detail))
    return [row for row in rows if names is None or row.name in names]
