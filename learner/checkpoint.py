"""The resumable state of a learner: DeepSpeed's own files plus our facts, written into one given folder and synced.

`save` writes only below that folder; making the result atomic (manifest, rename) is the caller's job, so DeepSpeed's
`latest` file is never written. The step decides the learning rate, and nothing in a learner step is random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learner.export import sync_directory
from learner.spec import LearnerError

TAG = "learner"
FACTS = "learner.json"


def save_state(engine: Any, directory: Path, facts: dict[str, Any], rank: int) -> None:
    """Write optimiser, master weights and `facts` below an existing folder; collective, synced when it returns."""
    engine.save_checkpoint(str(directory), tag=TAG, client_state={"facts": facts}, save_latest=False)
    if rank == 0:
        (directory / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    sync_directory(directory)


def read_facts(directory: Path) -> dict[str, Any]:
    """The facts of a saved state; raises `LearnerError` if there is none."""
    path = directory / FACTS
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LearnerError(f"{directory}: no learner state that can be read: {error}") from None
    return facts


def load_state(engine: Any, directory: Path) -> dict[str, Any]:
    """Restore what `save_state` wrote and return its facts; collective."""
    facts = read_facts(directory)
    path, _ = engine.load_checkpoint(str(directory), tag=TAG)
    if path is None:
        raise LearnerError(f"{directory}: DeepSpeed could not load the state below {TAG}/")
    return facts
