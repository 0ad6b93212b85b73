"""The demo's model: an ordinary checkpoint whose tokenizer round-trips the task's text."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration.chain_task import ChainTask, TraceMixture, question_text, traces
from orchestration.prompt_tokenizer import PromptTokenizer
from orchestration.tiny_model import EOS, VOCABULARY, TinyModelShape, build_tiny_model
from reward.math import grade
from reward.verdict import Verdict


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    build_tiny_model(directory, TinyModelShape(), seed=3)
    return directory


def test_transformers_loads_it_and_its_size_is_as_stated(model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == len(VOCABULARY)
    assert str(model.dtype) == "torch.float32"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert 215_000 < model.num_parameters() < 225_000


def test_the_seed_decides_the_weights(model_dir: Path, tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "same", TinyModelShape(), seed=3)
    build_tiny_model(tmp_path / "other", TinyModelShape(), seed=4)
    original = (model_dir / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == original
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != original


def test_prompt_ends_with_thinking_and_both_tokenizers_agree(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": question_text((3, 1, 4, 0, 2))}]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "3", "1", "4", "0", "2", "=", "<think>"]
    assert PromptTokenizer(model_dir).encode_chats([chat]) == [tuple(ids)]


def test_responses_round_trip_and_decode_to_text_that_a_verifier_reads(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    stream = traces(ChainTask(), TraceMixture(direct_share=0.5), seed=0)
    for _ in range(20):
        response = next(stream).response
        ids = tokenizer(response, add_special_tokens=False).input_ids
        assert len(ids) + 1 <= ChainTask().max_response_tokens
        assert tokenizer.unk_token_id not in ids
        text = tokenizer.decode([*ids, tokenizer.convert_tokens_to_ids(EOS)], skip_special_tokens=True)
        assert text == response
        assert grade(text, f"\\boxed{{{response[-2]}}}") is Verdict.CORRECT


def test_end_of_thinking_is_one_token_and_stays_visible_in_text(model_dir: Path) -> None:
    tokenizer = PromptTokenizer(model_dir)
    assert tokenizer.encode("</think>") == (tokenizer.token_id("</think>"),)
