"""A real run through every part, a graceful stop and a resume.

Word problems, a byte-level tokenizer, a Qwen2 layout and a model without an end-of-thinking token.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from orchestration.checkpoints import damage
from orchestration.run_state import load_state
from tests.chaos.faults import committed_once
from tests.end_to_end.recipes import Run, recipe

pytestmark = pytest.mark.slow


def word_problems(count: int) -> list[dict]:
    """Questions in the layout of the released GSM8K files."""
    rows = []
    for i in range(count):
        apples, price = 2 + i % 17, 3 + i // 17
        text = f"Anna sells {apples} bags of apples for {price} dollars each. How many dollars does she get?"
        rows.append({"prompt": [{"from": "user", "value": text}], "final_answer": str(apples * price)})
    return rows


def build_model(directory: Path, texts: list[str]) -> None:
    """A random Qwen2 with a byte-level tokenizer trained on the questions; it has no `</think>`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    from tests.tiny_models import tiny_qwen2

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = tiny_qwen2(
        vocab_size=core.get_vocab_size(),
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=core.token_to_id("<|im_end|>"),
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def test_sigterm_then_resume_with_fewer_actors(tmp_path: Path) -> None:
    """Deltas, ZeRO 2 and MLflow; stopped after some steps by SIGTERM, finished by one rollout actor instead of two."""
    problems = word_problems(200)
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps(problems), encoding="utf-8")
    build_model(tmp_path / "model", [row["prompt"][0]["value"] for row in problems])
    run_dir = tmp_path / "outputs" / "pair"
    config = recipe(
        tmp_path,
        run_dir,
        steps=400,
        model__add_end_of_thinking=True,
        data__train={"path": str(questions)},
        data__prompt_suffix="\nPut your final answer within \\boxed{}.",
        data__max_prompt_tokens=256,
        sampling__max_new_tokens=48,
        sampling__max_thinking_tokens=24,
        sampling__top_k=10,
        rollout__num_actors=2,
        learner__zero_stage=2,
        pipeline__transport="delta",
        tracking__mlflow=True,
    )
    run = Run(config)
    run.wait_for_step(3)
    assert len(run.actors("ray::RolloutActor")) == 2
    descendants = run.descendants()
    run.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert run.wait(deadline_s=30) == 75, run.tail()
    assert time.monotonic() - started < 15
    assert not _alive(descendants)

    done = len(run.metrics())
    run = Run(config, f"steps={done + 2}", "--resume", "rollout.num_actors=1")
    run.wait_for_step(done + 1)
    descendants = run.descendants()
    assert run.wait() == 0, run.tail()
    assert not _alive(descendants)

    lines = run.metrics()
    steps = list(range(1, done + 3))
    assert [line["step"] for line in lines] == steps, "no step is repeated or skipped after a graceful stop"
    assert [line["sync/version"] for line in lines] == steps
    assert all(line["staleness/max"] <= 1 for line in lines)
    assert all(line["rollout/soft_share"] > 0.2 for line in lines), "a silent fall-back to discrete rollouts"
    assert all(0 < line["rollout/length_mean"] <= 48 for line in lines)
    trained = [json.loads(line) for line in (run_dir / "groups.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in trained] == steps, "a step has trained twice"
    assert {line["attempt"] for line in trained} == {1, 2}
    committed_once(run, steps[-1])
    checkpoint = run_dir / "checkpoints" / f"step_{steps[-1]:06d}"
    assert damage(checkpoint) is None
    assert load_state(checkpoint).counts["trained"] == lines[-1]["groups/trained"] == 4 * steps[-1]

    assert (run_dir / "model" / "model.safetensors").is_file()
    tokens = json.loads((run_dir / "initial_model" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert "</think>" in [token["content"] for token in tokens]
    sample = pq.read_table(run_dir / "trajectories" / "step_000001.parquet")
    assert sample.num_rows == 4
    assert {"noise", "weights", "version_runs", "verdict"} <= set(sample.column_names)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["rollout"]["num_actors"] == 1
    with sqlite3.connect(run_dir.parent / "mlflow.db") as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
        logged = store.execute("select step from metrics where key = 'reward/mean' order by step").fetchall()
    assert [step for (step,) in logged] == steps


def _alive(processes: list) -> list:
    import psutil

    return psutil.wait_procs(processes, timeout=30)[1]
