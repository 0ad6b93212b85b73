"""In processes of their own: what this one has imported already cannot be hidden."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from rollout import engine_thread
from tests.rollout.conftest import base_spec


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_we_need_of_deepspeed_and_transformers_does_without() -> None:
    run("""
import gc, sys
from rollout.lean_imports import UNUSED, lean_imports
with lean_imports():
    import deepspeed
    import transformers.models.auto.modeling_auto
    assert not gc.isenabled()
from transformers import AutoModelForCausalLM, GenerationMixin
assert gc.isenabled()
heavy = {name.split(".")[0] for name in sys.modules} & {*UNUSED, "pandas", "scipy"}
assert not heavy, heavy
import sklearn  # hidden no more
""")


def test_what_was_imported_before_stays() -> None:
    run("""
import sys, types
sys.modules["mlflow"] = imported = types.ModuleType("mlflow")
from rollout.lean_imports import lean_imports
with lean_imports():
    import mlflow
    assert mlflow is imported
    try:
        import sklearn
    except ImportError:
        pass
    else:
        raise AssertionError("found")
assert sys.modules["mlflow"] is imported
""")


def test_an_engine_starts_lean(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def engine(spec: object) -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("far enough")

    monkeypatch.setattr(engine_thread, "SoftEngine", engine)
    thread = engine_thread.EngineThread(base_spec(Path("no model")))
    with pytest.raises(RuntimeError, match="far enough"):
        thread.started.result(timeout=30)
    assert seen == [False]


def test_a_learner_rank_starts_lean() -> None:
    run("""
import sys, types
from pathlib import Path
from learner.actor import LearnerRank
from tests.learner.handmade import learner_spec
class Trainer:
    def __init__(self, *arguments): pass
    def describe(self): return {}
sys.modules["learner.trainer"] = types.SimpleNamespace(Trainer=Trainer)
LearnerRank(learner_spec(Path("no model")), 0).start(("127.0.0.1", 1), None)
assert "deepspeed" in sys.modules
assert not {"mlflow", "sklearn"} & set(sys.modules)
""")
