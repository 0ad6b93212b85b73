"""Prompts with gold answers from Parquet, JSON or JSONL, and the order in which a run visits them.

Layouts, detected from the fields of a row unless `columns` maps them:

    chat with a rule   {data_source, prompt: [{role, content}], reward_model: {ground_truth}}
    conversations      {prompt: [{from, value}], final_answer}
    plain              {question | problem, answer}; an answer that ends in `#### 42` means 42

Invariants: a prompt id depends on the content of its row only, never on its place; the order of epoch e depends on the
seed, e and the set of ids only; `PromptStream` never skips or repeats a prompt within an epoch, wherever it resumes.
Every problem of a file names the file, the row, the value and the fix.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.config import ConfigError
from orchestration.config_sections import ColumnMapping, DatasetConfig, RewardConfig

Gold = str | dict[str, Any]
Message = dict[str, str]
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
DEFAULT_RULE = "math"
MAX_LISTED = 5
GSM8K_ANSWER = re.compile(r"####\s*([^\n]+?)\s*\Z")
HUB_PREFIX = "hf://datasets/"
logger = logging.getLogger(__name__)


class MissingData(ConfigError):
    """A dataset of the hub that is not in the local cache: to be fetched, not to be corrected."""


class BadRow(ValueError):
    """A row without a usable prompt or answer; the message says what and how to correct it."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One question with its gold answer."""

    prompt_id: str
    """Stable and unique in its file: the dataset's name and a digest of the row's content."""
    messages: tuple[Message, ...]
    """The chat, ending with a user message; without the recipe's system prompt and suffix."""
    gold: Gold
    data_source: str
    rule: str
    line: int
    """Line (JSONL) or row (Parquet, JSON), from 1."""


def load_rows(dataset: DatasetConfig, reward: RewardConfig, max_bad_rows: int = 0) -> list[PromptRow]:
    """Read one dataset file.

    Raises `MissingData` for a hub dataset that is not cached and `ConfigError` for a file that is missing, empty or
    unreadable or has more than `max_bad_rows` bad rows; tolerated bad rows are logged one by one.
    """
    rows, problems = read_rows(dataset, reward)
    report_bad_rows(problems, max_bad_rows)
    if not rows:
        raise ConfigError(f"{dataset.path}: no usable rows; give a file with at least one prompt and its answer")
    return rows


def read_rows(dataset: DatasetConfig, reward: RewardConfig) -> tuple[list[PromptRow], list[str]]:
    """Good rows of a dataset file, and one message for each bad one."""
    path = locate(dataset.path)
    name = dataset_name(dataset)
    rows: list[PromptRow] = []
    problems: list[str] = []
    seen: Counter[str] = Counter()
    for line, record in _records(path):
        try:
            rows.append(_parse_row(record, line, name, dataset, reward, seen))
        except BadRow as problem:
            problems.append(f"{place(dataset.path, line)}: {problem}")
        if dataset.limit and len(rows) >= dataset.limit:
            break
    return rows, problems


def dataset_name(dataset: DatasetConfig) -> str:
    """What a dataset is called: its `name`, or its file."""
    return dataset.name or Path(dataset.path).stem


def locate(path: str) -> Path:
    """The local file of a path or of `hf://datasets/OWNER/NAME/FILE` (looked up in the hub's local cache)."""
    if path.startswith(HUB_PREFIX):
        return _locate_in_hub_cache(path)
    try:
        file = Path(path).expanduser()
    except RuntimeError as error:  # `~nobody/file`
        raise ConfigError(f"{path}: {error}; write the path from the root") from None
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "no such file"
        raise ConfigError(f"{path}: {what}; set data.*.path to a Parquet, JSON or JSONL file")
    return file


def _locate_in_hub_cache(path: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    owner, _, rest = path.removeprefix(HUB_PREFIX).partition("/")
    name, _, file = rest.partition("/")
    if not file:
        raise ConfigError(f"{path}: write a dataset of the hub as {HUB_PREFIX}OWNER/NAME/FILE")
    try:
        found = try_to_load_from_cache(f"{owner}/{name}", file, repo_type="dataset")
    except HFValidationError as error:
        raise ConfigError(f"{path}: {owner}/{name} is no name of the hub: {error}") from None
    if not isinstance(found, str):
        raise MissingData(
            f"{path}: not in the local cache; fetch it with `hf download --repo-type dataset {owner}/{name} {file}`"
        )
    return Path(found)


def place(path: str, line: int) -> str:
    """How messages point at a row."""
    return f"{path}:{line}" if path.endswith(".jsonl") else f"{path}, row {line}"


def report_bad_rows(problems: Sequence[str], max_bad_rows: int) -> None:
    """Log tolerated bad rows; raise `ConfigError` when there are more than `max_bad_rows`."""
    if len(problems) <= max_bad_rows:
        for problem in problems:
            logger.warning("skipped %s", problem)
        return
    listed = "\n  ".join(problems[:MAX_LISTED])
    more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    if len(problems) == 1:
        raise ConfigError(f"{listed} (or skip it with data.max_bad_rows=1)")
    raise ConfigError(
        f"{len(problems)} bad rows; correct them or skip them with data.max_bad_rows={len(problems)}:\n  {listed}{more}"
    )


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".json": _read_json}
    if path.suffix not in readers:
        raise ConfigError(f"{path}: unknown type {path.suffix or '(no suffix)'}; use .parquet, .json or .jsonl")
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not a readable Parquet file: {error}") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                text = _as_text(raw, f"{path}:{line}")
                try:
                    yield line, json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise _not_json(f"{path}:{line}", text, error) from None


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    text = _as_text(path.read_bytes(), str(path))
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _read_jsonl(path)
            return
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise _not_json(f"{path}{line}", text, error) from None
    if not isinstance(tree, list):
        raise ConfigError(f"{path}: expected a list of rows, found {type(tree).__name__}")
    yield from enumerate(tree, start=1)


def _as_text(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text ({error}); save it as UTF-8") from None


def _not_json(where: str, text: str, error: Exception) -> ConfigError:
    """Python also refuses numbers of thousands of digits (a plain ValueError) and nesting that is too deep."""
    reason = error.msg if isinstance(error, json.JSONDecodeError) else error
    return ConfigError(f"{where}: not JSON ({reason}): {text.strip()[:80]!r}")


def _parse_row(
    record: Any, line: int, name: str, dataset: DatasetConfig, reward: RewardConfig, seen: Counter[str]
) -> PromptRow:
    if not isinstance(record, dict):
        raise BadRow(f"expected an object with fields, found {record!r:.80}")
    columns = dataset.columns or _detect_columns(record)
    messages = _parse_messages(_field(record, columns.prompt), columns.prompt)
    gold = _parse_gold(_field(record, columns.answer), columns.answer)
    data_source = _field(record, columns.data_source) if columns.data_source else None
    source = str(data_source or name)
    rule = dataset.rule or reward.rules.get(source) or reward.rules.get("default") or DEFAULT_RULE
    return PromptRow(_prompt_id(name, messages, gold, seen), messages, gold, source, rule, line)


def _detect_columns(record: dict[str, Any]) -> ColumnMapping:
    if "prompt" in record and "reward_model" in record:
        return ColumnMapping(prompt="prompt", answer="reward_model.ground_truth", data_source="data_source")
    if "prompt" in record and "final_answer" in record:
        return ColumnMapping(prompt="prompt", answer="final_answer", data_source="data_source")
    for prompt in ("question", "problem"):
        if prompt in record:
            return ColumnMapping(prompt=prompt, answer="answer", data_source="data_source")
    raise BadRow(
        f"unknown layout with fields {', '.join(sorted(map(str, record)))}; name the prompt and the answer in "
        "data.*.columns"
    )


def _field(record: dict[str, Any], path: str) -> Any:
    value: Any = record
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _parse_messages(value: Any, column: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column}={value!r:.80}: expected a text or a list of messages")
    messages = tuple(_parse_message(message, column) for message in value)
    if messages[-1]["role"] != "user":
        raise BadRow(f"{column}: the last message is of {messages[-1]['role']}; a prompt ends with a user message")
    if not messages[-1]["content"].strip():
        raise BadRow(f"{column}: the last user message is empty")
    return messages


def _parse_message(message: Any, column: str) -> Message:
    fields = message if isinstance(message, dict) else {}
    role = ROLES.get(str(fields.get("role", fields.get("from"))))
    content = fields.get("content", fields.get("value"))
    if role is None or not isinstance(content, str):
        raise BadRow(f"{column}: message {message!r:.80} needs role and content (or from and value), both texts")
    return {"role": role, "content": content}


def _parse_gold(value: Any, column: str) -> Gold:
    if isinstance(value, dict) and value:
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise BadRow(f"{column}={value!r:.80}: no gold answer; give a text or a number")
    text = str(value).strip()
    match = GSM8K_ANSWER.search(text)
    return match.group(1) if match else text


def _prompt_id(name: str, messages: tuple[Message, ...], gold: Gold, seen: Counter[str]) -> str:
    content = json.dumps([messages, gold], sort_keys=True, ensure_ascii=False, default=str)
    try:
        digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{error.object[error.start]!r} is half of a character, which no text can hold; remove it"
        ) from None
    seen[digest] += 1
    suffix = f"-{seen[digest]}" if seen[digest] > 1 else ""
    return f"{re.sub('[^A-Za-z0-9._-]', '_', name)}-{digest}{suffix}"


@dataclass(frozen=True, slots=True)
class Visit:
    """One prompt to be issued: `visit` counts how often this run has issued it, from 0."""

    row: PromptRow
    visit: int

    @property
    def group_id(self) -> str:
        """The GRPO group of this visit."""
        return f"{self.row.prompt_id}@{self.visit}"


class PromptStream:
    """Endless visits in shuffled epochs; `state()` and `restore()` continue exactly where a run stopped.

    The order within an epoch is by a keyed digest of the prompt ids, so it survives other Python versions and other
    row orders. Every prompt is visited once per epoch: the visit number is the epoch.
    """

    def __init__(self, rows: Sequence[PromptRow], *, seed: int) -> None:
        if not rows:
            raise ValueError("a prompt stream needs at least one row")
        self._rows = list(rows)
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)
        self._digest = dataset_digest(sorted(self._rows, key=lambda row: row.prompt_id))

    def __iter__(self) -> PromptStream:
        return self

    def __next__(self) -> Visit:
        if self._position == len(self._order):
            self._epoch += 1
            self._position = 0
            self._order = self._order_of(self._epoch)
        visit = Visit(self._order[self._position], self._epoch)
        self._position += 1
        return visit

    @property
    def prompts_visited(self) -> int:
        """Visits so far, over all epochs."""
        return self._epoch * len(self._rows) + self._position

    def state(self) -> dict[str, Any]:
        """The cursor, the seed of its order, and a digest of the prompts that it points into."""
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed, "digest": self._digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the visits of `state`; raises `ConfigError` if the data or the seed changed in between."""
        # Earlier checkpoints have no seed: their digest is of the order of epoch 0.
        digest = self._digest if "seed" in state else dataset_digest(self._order_of(0))
        if state["digest"] != digest:
            raise ConfigError(
                f"the training data changed since the checkpoint (digest {state['digest']}, now {digest}): resume with "
                "the same file, limits and seed, or start a new run under another name"
            )
        if state.get("seed", self._seed) != self._seed:
            raise ConfigError(
                f"seed={self._seed}, but the checkpoint was made with seed={state['seed']}, which decides the order of "
                f"the prompts: resume with seed={state['seed']}, or start a new run under another name"
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> list[PromptRow]:
        key = f"{self._seed}\x1f{epoch}".encode()
        return sorted(self._rows, key=lambda row: hashlib.blake2b(row.prompt_id.encode(), key=key).digest())


def dataset_digest(rows: Sequence[PromptRow]) -> str:
    """A short digest of the prompts and their order."""
    joined = "\n".join(row.prompt_id for row in rows)
    return hashlib.blake2b(joined.encode(), digest_size=8).hexdigest()
