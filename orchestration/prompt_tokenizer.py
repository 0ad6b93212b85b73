"""Chat template and tokenizer of a checkpoint, without transformers (which imports torch).

Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`; the ids equal
those of transformers' `apply_chat_template(messages, add_generation_prompt=True)`. Templates see a fixed date, so a
prompt does not change at midnight in the middle of a run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestration.config import ConfigError
from orchestration.config_sections import DataConfig, ModelConfig
from orchestration.dataset import Message

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date that Llama 3 templates fall back to when they are given none."""
MAX_IDS_SHOWN = 8


class PromptTokenizer:
    """Turns chats into prompt ids."""

    def __init__(self, directory: Path) -> None:
        """Load from a checkpoint directory; raises `ConfigError` where a file is missing or unreadable."""
        from tokenizers import Tokenizer

        self.directory = directory
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"model.path={directory}: no tokenizer.json; save it with "
                "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the bindings raise bare Exception for every unreadable file
            raise ConfigError(f"{file}: not a tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._settings = _read_json(directory / "tokenizer_config.json")
        self._add_declared_tokens()

    def _add_declared_tokens(self) -> None:
        from tokenizers import AddedToken

        declared = self._settings.get("added_tokens_decoder", {})
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        missing = sorted((int(index), token) for index, token in declared.items() if token["content"] not in known)
        for _, token in missing:
            options = {key: token[key] for key in ("lstrip", "rstrip", "normalized", "single_word", "special")}
            self._tokenizer.add_tokens([AddedToken(token["content"], **options)])

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, token: str) -> int | None:
        """The id of one token of the vocabulary."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token(self, index: int) -> str | None:
        """The token of an id."""
        found: str | None = self._tokenizer.id_to_token(index)
        return found

    def is_ordinary(self, index: int) -> bool:
        """True for a token that also occurs in plain text: neither special nor added."""
        return index not in self._tokenizer.get_added_tokens_decoder() and index < self.size

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text as it stands, without added special tokens."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> list[tuple[int, ...]]:
        """Ids of chats with the generation prompt, in order."""
        texts = [self.render(messages) for messages in chats]
        return [tuple(encoding.ids) for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as text, ending where the model goes on; raises `ConfigError` if the template refuses it."""
        from jinja2 import TemplateError

        try:
            text: str = self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.special_tokens,
            )
            text.encode()
        except TemplateError as error:
            raise ConfigError(
                f"model.path={self.directory}: its chat template refuses {messages[-1]['content'][:60]!r}: {error}"
            ) from None
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"a prompt holds {text[error.start]!r}, half of a character, which is no text: "
                f"{messages[-1]['content'][:60]!r}; remove it"
            ) from None
        return text

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Named special tokens, as templates see them."""
        values = {**_read_json(self.directory / "special_tokens_map.json"), **self._settings}
        named = {name: values.get(name) for name in SPECIAL_TOKENS}
        contents = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
        return {name: content for name, content in contents.items() if content}

    @cached_property
    def _template(self) -> Any:
        source = self._template_source()
        if source is None:
            raise ConfigError(
                f"model.path={self.directory}: the tokenizer has no chat template (no chat_template.jinja and no "
                "chat_template in tokenizer_config.json); use an instruction-tuned model or add the file"
            )
        return _environment().from_string(source)

    def _template_source(self) -> str | None:
        file = self.directory / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        legacy = _read_json(self.directory / "chat_template.json").get("chat_template")
        template = legacy or self._settings.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template

    def require_chat_template(self) -> None:
        """Raise `ConfigError` now rather than at the first prompt."""
        from jinja2 import TemplateSyntaxError

        try:
            _ = self._template
        except TemplateSyntaxError as error:
            raise ConfigError(f"model.path={self.directory}: its chat template is not valid: {error}") from None


def with_recipe_prompt(messages: Sequence[Message], data: DataConfig) -> list[Message]:
    """The chat of a row with the recipe's system prompt in front and its suffix on the last user message."""
    chat = [dict(message) for message in messages]
    if data.prompt_suffix:
        chat[-1]["content"] += data.prompt_suffix
    if data.system_prompt is not None and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": data.system_prompt})
    return chat


def resolve_model_dir(model: ModelConfig) -> Path | None:
    """The local directory of a checkpoint: a path, or a hub name in the local cache; None if the hub's is not cached.

    Raises `ConfigError` for a local path that does not exist.
    """
    try:
        path = Path(model.path).expanduser()
    except RuntimeError as error:  # `~nobody/model`
        raise ConfigError(f"model.path={model.path}: {error}; write the path from the root") from None
    if path.is_dir():
        return path
    parts = model.path.split("/")
    if path.is_absolute() or model.path.startswith((".", "~")) or len(parts) != 2 or path.parent.exists():
        raise ConfigError(
            f"model.path={model.path}: no such directory; give a checkpoint directory or a hub name (OWNER/NAME)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.path, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ConfigError(
            f"model.path={model.path}: no such directory, and no name of the hub ({error}); give a checkpoint "
            "directory or OWNER/NAME"
        ) from None


def end_of_thinking_id(model: ModelConfig, tokenizer: PromptTokenizer, vocabulary: int, *, trains: bool = True) -> int:
    """The single id that ends thinking; raises `ConfigError` if it is not exactly one known id.

    `vocabulary` is the number of rows of the embedding; with `add_end_of_thinking` the id may lie one behind it where
    somebody `trains`: nobody else adds it, and an untrained row that happens to be there ends nothing.
    """
    token = model.end_of_thinking
    if isinstance(token, int):
        if not 0 <= token < vocabulary:
            raise ConfigError(f"model.end_of_thinking={token}: not an id of this model (0 to {vocabulary - 1})")
        return token
    known = tokenizer.token_id(token)
    if known is not None:
        return known
    if model.add_end_of_thinking and trains:
        return tokenizer.size
    if model.add_end_of_thinking:
        raise ConfigError(
            f"model.add_end_of_thinking: the tokenizer of {model.path} has no {token!r}, and only `softgrpo train` "
            "adds it; give the model that training exported (RUN/model), or think in discrete tokens only"
        )
    pieces = tokenizer.encode(token)
    raise ConfigError(
        f"model.end_of_thinking={token!r}: the tokenizer of {model.path} splits it into {len(pieces)} ids "
        f"{list(pieces[:MAX_IDS_SHOWN])}; name a token of its vocabulary or an id, or set "
        "model.add_end_of_thinking=true to add it and resize the embeddings"
    )


def _environment() -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_block()]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=TEMPLATE_DATE.strftime)
    return environment


def _generation_block() -> Any:
    """`{% generation %}` marks the assistant's text in training templates; for prompts its body is all that counts."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlock(Extension):
        tags = {"generation"}  # noqa: RUF012  (the name and type that jinja2 reads)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    return GenerationBlock


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected an object, found {type(tree).__name__}")
    return tree
