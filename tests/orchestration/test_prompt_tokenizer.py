"""Prompts are tokenized without transformers and to the same ids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestration.config import ConfigError
from orchestration.config_sections import DataConfig, DatasetConfig, ModelConfig
from orchestration.dataset import Message
from orchestration.model_facts import read_model_facts
from orchestration.prompt_tokenizer import (
    PromptTokenizer,
    end_of_thinking_id,
    resolve_model_dir,
    with_recipe_prompt,
)

REASONING_TEMPLATE = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='') -%}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{% endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}{% endif %}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ '<|assistant|>' + message['content'].split('</think>')[-1] + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}
    {% if add_generation_prompt %}
{{ '<|assistant|><think>\\n' }}{% endif %}
"""
DATED_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{{- "<|user|>Today: " + date_string + "\\n" }}
{%- for message in messages %}
    {%- if loop.index0 > 4 %}{%- break %}{%- endif %}
    {{- '<|' + message.role + '|>' + message.content | trim }}
{%- endfor %}
{{- {"generation": add_generation_prompt, "ä": 1} | tojson }}
"""
CHATS: list[list[Message]] = [
    [{"role": "user", "content": "What is 6 x 7?"}],
    [{"role": "user", "content": "  leading, trailing and\n\nblank lines  \n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe: \\frac{1}{2} 你好 🙂"}],
    [{"role": "user", "content": "text that contains </think> and <|user|> itself"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>hm</think>two"},
        {"role": "user", "content": "three"},
    ],
]


def build_byte_level(directory: Path, template: str | None, *, in_config: bool = False) -> Path:
    """A byte-level tokenizer that also prepends its own BOS when special tokens are asked for, as Llama 3 does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["What is the number of what?", "trailing blank lines and leading spaces"], trainer)
    core.add_special_tokens(["<|user|>", "<|assistant|>"])
    core.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    directory.mkdir(parents=True)
    core.enable_truncation(4)
    core.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<bos>"},
        "eos_token": "<eos>",
        "pad_token": None,
    }
    if template is not None and in_config:
        settings["chat_template"] = template
    elif template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


@pytest.mark.parametrize("in_config", [False, True], ids=["jinja-file", "in-config"])
@pytest.mark.parametrize("template", [REASONING_TEMPLATE, DATED_TEMPLATE], ids=["reasoning", "dated"])
def test_ids_equal_those_of_transformers(
    tmp_path: Path, template: str, in_config: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    import orchestration.prompt_tokenizer as ours

    directory = build_byte_level(tmp_path / "model", template, in_config=in_config)
    expected = AutoTokenizer.from_pretrained(directory)
    today = chat_template_utils.datetime.now()
    monkeypatch.setattr(ours, "TEMPLATE_DATE", today)
    ids = PromptTokenizer(directory).encode_chats(CHATS)
    for chat, found in zip(CHATS, ids, strict=True):
        wanted = expected.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert list(found) == list(wanted), chat
        assert len(found) > 4, "truncation of the file is switched off"


def test_ids_equal_for_the_tokenizer_class_of_the_distilled_models(tmp_path: Path) -> None:
    """DeepSeek-R1-Distill-Qwen names a Llama class; transformers goes by the model type."""
    from transformers import AutoTokenizer

    directory = build_byte_level(tmp_path / "model", REASONING_TEMPLATE)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))
    (directory / "config.json").write_text('{"model_type": "qwen2"}')
    expected = AutoTokenizer.from_pretrained(directory)
    for chat, found in zip(CHATS, PromptTokenizer(directory).encode_chats(CHATS), strict=True):
        assert list(found) == expected.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_ids_of_the_tiny_model_equal_those_of_transformers(tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "w1 w2 unknown w3"}]
    expected = AutoTokenizer.from_pretrained(tiny_model_dir)
    (found,) = PromptTokenizer(tiny_model_dir).encode_chats([chat])
    assert list(found) == expected.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_the_date_of_templates_is_fixed(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(build_byte_level(tmp_path / "model", DATED_TEMPLATE))
    assert "Today: 26 Jul 2024" in tokenizer.render(CHATS[0])


def test_declared_tokens_that_the_tokenizer_file_lacks_are_added(tmp_path: Path) -> None:
    directory = build_byte_level(tmp_path / "model", REASONING_TEMPLATE)
    size = PromptTokenizer(directory).size
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    settings["added_tokens_decoder"] = {str(size): {"content": "<late>", **flags}}
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert PromptTokenizer(directory).encode("<late>") == (size,)


def test_the_recipe_adds_system_prompt_and_suffix() -> None:
    data = DataConfig(train=DatasetConfig(path="x"), system_prompt="Think.", prompt_suffix=" Box it.")
    chat = with_recipe_prompt(CHATS[0], data)
    assert chat == [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 6 x 7? Box it."}]
    assert with_recipe_prompt(CHATS[2], data)[0]["content"] == "Be brief.", "a chat keeps its own system prompt"
    assert CHATS[0][0]["content"] == "What is 6 x 7?", "rows are not changed in place"


def test_a_model_without_chat_template_or_tokenizer(tmp_path: Path) -> None:
    bare = build_byte_level(tmp_path / "bare", None)
    with pytest.raises(ConfigError, match=r"bare: the tokenizer has no chat template"):
        PromptTokenizer(bare).require_chat_template()
    (bare / "chat_template.jinja").write_text("{% if %}", encoding="utf-8")
    with pytest.raises(ConfigError, match="its chat template is not valid"):
        PromptTokenizer(bare).require_chat_template()
    (bare / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"refuses 'What is 6 x 7\?'.*roles must alternate"):
        PromptTokenizer(bare).render(CHATS[0])
    (bare / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer"):
        PromptTokenizer(bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        PromptTokenizer(bare)


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    directory = build_byte_level(tmp_path / "model", "{{ messages.__class__.__mro__ }}")
    with pytest.raises(ConfigError, match="refuses"):
        PromptTokenizer(directory).render(CHATS[0])


def test_the_end_of_thinking_is_one_known_id(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(build_byte_level(tmp_path / "model", REASONING_TEMPLATE))
    vocabulary = tokenizer.size

    def resolve(**model: Any) -> int:
        return end_of_thinking_id(ModelConfig(path="some/model", **model), tokenizer, vocabulary)

    assert resolve() == tokenizer.token_id("</think>") == vocabulary - 1
    assert resolve(end_of_thinking=7) == 7
    assert resolve(end_of_thinking="<done>", add_end_of_thinking=True) == vocabulary
    with pytest.raises(ConfigError, match=r"end_of_thinking='<done>'.*splits it into \d+ ids .*add_end_of_thinking"):
        resolve(end_of_thinking="<done>")
    with pytest.raises(ConfigError, match=rf"end_of_thinking={vocabulary}: not an id .*0 to {vocabulary - 1}"):
        resolve(end_of_thinking=vocabulary)


def test_model_paths(tmp_path: Path) -> None:
    assert resolve_model_dir(ModelConfig(path=str(tmp_path))) == tmp_path
    assert resolve_model_dir(ModelConfig(path="no-such-owner/no-such-model")) is None
    for path in ("/no/such/model", "./model", "model", "a/b/c", "a b/c", "foo/bar--baz", "~no-such-user/m"):
        with pytest.raises(ConfigError, match=r"no such directory|from the root"):
            resolve_model_dir(ModelConfig(path=path))


def test_model_facts(tiny_model_dir: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    facts = read_model_facts(tiny_model_dir)
    with safe_open(tiny_model_dir / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  (not a dict)
    assert facts.num_parameters == sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    config = json.loads((tiny_model_dir / "config.json").read_text())
    heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    assert facts.kv_bytes_per_token(4) == 2 * layers * heads * config["head_dim"] * 4
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_model_facts(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 10}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"hidden_size.* missing"):
        read_model_facts(tmp_path)
    for change, message in (
        ({"num_attention_heads": 0}, "num_attention_heads=0: expected whole numbers from 1"),
        ({"vocab_size": True}, "vocab_size=True: expected whole numbers from 1"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads='2': expected whole numbers from 1"),
        ({"architectures": "LlamaForCausalLM"}, "expected a list of names"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            read_model_facts(tmp_path)
    for content, message in (("[1]", "expected an object, found list"), ("[" * 100_000, "not readable JSON")):
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            read_model_facts(tmp_path)
    (tmp_path / "config.json").write_text((tiny_model_dir / "config.json").read_text(), encoding="utf-8")
    assert not read_model_facts(tmp_path).has_weights
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match="convert them to safetensors"):
        read_model_facts(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"final_logit_softcapping": 30.0},
        {"logits_scaling": 8.0},
        {"logit_scale": 0.0625},
        {"model_type": "gemma3_text"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_models_that_rescale_logits_or_embeddings_are_refused(
    change: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_model_dir / "config.json").read_text())
    neutral = {**config, "final_logit_softcapping": None, "logits_scaling": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(neutral), encoding="utf-8")
    assert read_model_facts(tmp_path).vocab_size == config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{next(iter(change))}=.*wrong likelihoods; choose a model without"):
        read_model_facts(tmp_path)


def test_nothing_heavy_is_imported(tiny_model_dir: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from orchestration.prompt_tokenizer import PromptTokenizer;"
        "PromptTokenizer(Path(sys.argv[1])).encode_chats([[{'role': 'user', 'content': 'w1'}]]);"
        "print([m for m in ('torch', 'transformers', 'vllm', 'ray') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_model_dir)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
