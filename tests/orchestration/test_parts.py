"""What a controller asks the rollout actors for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.dataset import Visit
from orchestration.parts import Parts
from rollout.request import sample_seed
from tests.orchestration.simulation import prompt_rows
from tests.orchestration.test_inference_pools import recipe


@pytest.mark.parametrize("thinking", ["soft", "discrete"])
def test_a_group_is_asked_for_as_the_recipe_says(thinking: str) -> None:
    """The same visit of the same run has the same noise, whenever and wherever it is generated."""
    parts: Any = SimpleNamespace(prompt_ids=lambda visit: (1, 2, len(visit.row.prompt_id)))
    config = recipe(seed=7, sampling={"thinking": thinking}, algorithm={"group_size": 3})
    visit = Visit(prompt_rows(1)[0], 5)
    requests = Parts.requests(parts, visit, config)
    assert [request.thinking for request in requests] == [thinking] * 3
    assert [request.seed for request in requests] == [sample_seed(7, "p0", 5, index) for index in range(3)]
    assert [(request.sample_index, request.prompt_ids) for request in requests] == [(i, (1, 2, 2)) for i in range(3)]
    assert {(request.group_id, request.prompt_id) for request in requests} == {(visit.group_id, "p0")}
    assert len({request.request_id for request in requests}) == 3
