"""A small Llama-layout model with its own word-level tokenizer, saved as an ordinary Hugging Face directory.

Every part of the pipeline loads it like any other checkpoint: vLLM, transformers, `tokenizers`, DeepSpeed. The chat
template ends the generation prompt with `<think>`, and decoding joins tokens without spaces, so `\\boxed{`, `3`, `}`
read `\\boxed{3}`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.chain_task import END_OF_THINKING, STRATEGIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
START_OF_THINKING = "<think>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN)
VOCABULARY = (
    *SPECIAL_TOKENS,
    START_OF_THINKING,
    END_OF_THINKING,
    "\\boxed{",
    "}",
    "=",
    *(str(digit) for digit in range(10)),
    *STRATEGIES,
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + START_OF_THINKING + "{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyModelShape:
    """Sizes of the network; the defaults make 220 000 parameters."""

    hidden_size: int = 96
    num_layers: int = 2
    num_heads: int = 3
    """vLLM's attention on a CPU supports heads of 32 and its multiples."""
    intermediate_size: int = 256
    max_positions: int = 128


def build_tiny_model(directory: Path, shape: TinyModelShape, seed: int) -> None:
    """Write a freshly initialised fp32 model and its tokenizer to `directory`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=shape.max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
        _initialise(model)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per symbol of the task; text and ids round-trip exactly (spaces between symbols are dropped)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel(vocab={token: index for index, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    )
    core.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in (START_OF_THINKING, END_OF_THINKING)]
    )
    symbol = Regex(r"\\boxed\{|.")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(symbol, behavior="isolated")]
    )
    core.decoder = decoders.Fuse()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _initialise(model: Any) -> None:
    """Scales at which the warm start leaves its plateau in a few hundred updates: 0.05 for the tied embedding, else
    0.7 / sqrt(fan-in)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.05 if "embed_tokens" in name else 0.7 / math.sqrt(parameter.shape[1])
            parameter.data.normal_(0.0, std)
