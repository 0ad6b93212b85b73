"""One group of trajectories as Parquet, for people: what was asked, thought, answered and rewarded."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orchestration.step_metrics import FinishedGroup

FETCH_DEADLINE_S = 30.0


def save_sample(group: FinishedGroup, path: Path) -> None:
    """Fetch one group's batch and write it with question, gold answer, reward and verdict as extra columns.

    This is the only place where trajectories pass through the driver: one group every few steps.
    """
    import ray

    batch: pa.RecordBatch = ray.get(group.batch, timeout=FETCH_DEADLINE_S)
    row = group.visit.row
    extra = {
        "question": [row.messages[-1]["content"]] * batch.num_rows,
        "gold": [str(row.gold)] * batch.num_rows,
        "reward": [grade.reward for grade in group.grades],
        "verdict": [str(grade.verdict) for grade in group.grades],
    }
    table = pa.Table.from_batches([batch])
    for name, values in extra.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, path, compression="zstd")
