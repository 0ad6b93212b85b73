"""Two ranks: each sums the candidates of its vocabulary shard; the trajectories are those of one rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.rollout.conftest import Case, EngineFactory, base_spec, mixed_cases, reference_model, run
from tests.rollout.test_engine_weights import build_qwen2, bundle, changed
from tests.rollout.test_soft_parity import assert_parity

pytestmark = [pytest.mark.slow, pytest.mark.chaos]  # long: two more processes import vLLM


def test_two_ranks_and_a_weight_update(
    start_engine: EngineFactory, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two worker processes, started without our entry point as a `working_dir` has none; a tied model, so that the
    update must reach the sharded head on every rank."""
    monkeypatch.setenv("VLLM_PLUGINS", "")
    directory = build_qwen2(tmp_path, tied=True, kv_heads=2)
    model = reference_model(directory)
    spec = base_spec(directory)
    cases: list[Case] = mixed_cases(model, spec, count=64, seed=3)
    with start_engine(directory, tensor_parallel_size=2) as engine:
        assert_parity(cases, run(engine, cases))
        changed(model, seed=4)
        engine.load_weights(*bundle(model, 1))
        after = mixed_cases(model, spec, count=6, seed=5)
        found = run(engine, after)
        engine.shutdown()
    assert_parity(after, found)
    assert all((trajectory.versions == 1).all() for trajectory in found.values())
    assert np.concatenate([trajectory.weights for trajectory in found.values()]).shape[0] >= 20
