"""Seeds are stable and distinct, and the messages need no torch."""

from __future__ import annotations

import subprocess
import sys

from rollout.request import sample_seed


def test_seeds_are_stable_and_distinct() -> None:
    seeds = {
        sample_seed(run, f"p{prompt}", visit, k)
        for run in range(3)
        for prompt in range(9)
        for visit in range(3)
        for k in range(8)
    }
    assert len(seeds) == 3 * 9 * 3 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, "p1", 2, 3) == sample_seed(0, "p1", 2, 3)
    assert sample_seed(0, "p1", 11, 3) != sample_seed(0, "p11", 1, 3)


def test_messages_of_the_driver_import_no_torch() -> None:
    code = (
        "import sys, rollout.request, rollout.trajectory, rollout.trajectory_check, rollout.weights;"
        "found = {'torch', 'vllm', 'ray', 'transformers'} & set(sys.modules); sys.exit(repr(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
