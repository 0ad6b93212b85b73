"""Real questions, a byte-level tokenizer, a Qwen2 layout and a model without an end-of-thinking token: three steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.recipes import Run, recipe

pytestmark = pytest.mark.slow


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


def test_three_steps_on_real_questions(shared_dir: Path, tmp_path: Path) -> None:
    questions = shared_dir / "data" / "gsm8k.json"
    texts = [row["prompt"][0]["value"] for row in json.loads(questions.read_text(encoding="utf-8"))]
    build_model(tmp_path / "model", texts)
    run_dir = tmp_path / "run"
    config = recipe(
        tmp_path,
        run_dir,
        model__add_end_of_thinking=True,
        data__train={"path": str(questions), "limit": 200},
        data__prompt_suffix="\nPut your final answer within \\boxed{}.",
        data__max_prompt_tokens=512,
        data__max_bad_rows=5,
        sampling__max_new_tokens=48,
        sampling__max_thinking_tokens=24,
        sampling__top_k=10,
        learner__zero_stage=2,
    )
    run = Run(config)
    assert run.wait() == 0, run.tail()
    lines = run.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["rollout/soft_share"] > 0.3 for line in lines)
    assert all(0 < line["rollout/length_mean"] <= 48 for line in lines)
    assert (run_dir / "model" / "model.safetensors").is_file()
    tokens = json.loads((run_dir / "initial_model" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert "</think>" in [token["content"] for token in tokens]
