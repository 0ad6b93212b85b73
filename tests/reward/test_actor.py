from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from reward.actor import VerifierActor, VerifierSpec, answers_of
from reward.verdict import Verdict
from tests.reward.conftest import MEMORY_MB, assert_gone
from tests.reward.hostile import TOWER


def batch_of(answers: list[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "response_text": [f"<think>so</think>{answer}" for answer in answers],
            "answer_text": answers,
            "finish_reason": ["stop"] * len(answers),
            "response_ids": pa.array([[1] * len(answer) for answer in answers], pa.list_(pa.int32())),
        }
    )


def test_columns_become_answers() -> None:
    (answer,) = answers_of(batch_of(["abc"]))
    assert (answer.response_text, answer.answer_text, answer.num_tokens) == ("<think>so</think>abc", "abc", 3)
    bare = batch_of(["abc"]).select(["response_text", "answer_text", "finish_reason"])
    assert answers_of(bare)[0].num_tokens is None


def test_the_spec_imports_nothing_heavy() -> None:
    heavy = "('sympy', 'math_verify', 'torch', 'ray', 'vllm', 'pyarrow')"
    code = f"import sys, reward.actor; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_actor_grades_beside_a_bomb_and_takes_its_children_with_it(ray_local: None) -> None:
    import ray

    actor = ray.remote(VerifierActor).options(max_concurrency=4, num_cpus=0.5).remote(VerifierSpec(2, 6.0, MEMORY_MB))
    ready = ray.get(actor.ready.remote(), timeout=60)
    assert ready["program_isolation"].startswith("filter")
    stuck = actor.score.remote(ray.put(batch_of([TOWER])), "42", "math")
    began = time.monotonic()
    texts = [r"\boxed{6\cdot 7}", r"\boxed{7}", r"\boxed{\frac}"]
    grades = ray.get(actor.score.remote(ray.put(batch_of(texts)), "42", "math + 0.1*format"), timeout=30)
    assert [grade.verdict for grade in grades] == [Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNPARSEABLE]
    assert [grade.reward for grade in grades] == pytest.approx([1.1, 0.1, 0.1])
    assert time.monotonic() - began < 5.0, "the bomb of another group held this one up"
    assert ray.get(stuck, timeout=30)[0].verdict is Verdict.TIMEOUT
    stats = ray.get(actor.stats.remote(), timeout=30)
    assert stats["verdict_timeout"] == 1 and stats["verdict_correct"] == 1
    server = psutil.Process(int(stats["server_pid"]))
    family = [server, *server.children(recursive=True)]
    ray.kill(actor)
    assert_gone(family)
