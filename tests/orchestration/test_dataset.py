"""Datasets: three layouts, every kind of bad row, and an order that survives interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.config import ConfigError
from orchestration.config_sections import ColumnMapping, DatasetConfig, RewardConfig
from orchestration.dataset import MissingData, PromptRow, PromptStream, Visit, dataset_digest, load_rows

REWARD = RewardConfig()
Write = Callable[[str, Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(content), path)
        elif name.endswith(".jsonl"):
            path.write_text("\n".join(json.dumps(row) for row in content), encoding="utf-8")
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write_file


def load(path: Path, max_bad_rows: int = 0, **dataset: Any) -> list[PromptRow]:
    return load_rows(DatasetConfig(path=str(path), **dataset), REWARD, max_bad_rows)


PLAIN = {"question": "What is 6 x 7?", "answer": "6 x 7 = 42\n#### 42"}
CONVERSATION = {"prompt": [{"from": "human", "value": "What is 6 x 7?"}], "final_answer": 42}
CHAT = {
    "data_source": "aime",
    "prompt": [{"role": "user", "content": "What is 6 x 7?"}],
    "reward_model": {"ground_truth": "42", "style": "rule"},
}


@pytest.mark.parametrize(
    ("name", "record", "source"),
    [
        ("set.parquet", CHAT, "aime"),
        ("set.jsonl", CHAT, "aime"),
        ("set.json", CONVERSATION, "set"),
        ("set.jsonl", PLAIN, "set"),
        ("set.parquet", PLAIN, "set"),
        ("set.json", {"problem": "What is 6 x 7?", "answer": 42.0}, "set"),
    ],
)
def test_layouts_are_detected(write: Write, name: str, record: dict[str, Any], source: str) -> None:
    (row,) = load(write(name, [record]))
    assert row.messages == ({"role": "user", "content": "What is 6 x 7?"},)
    assert (row.gold, row.data_source, row.rule, row.line) == ("42", source, "math", 1)


def test_json_may_hold_lines_or_a_list(write: Write) -> None:
    lines = "\n".join(json.dumps({**PLAIN, "question": question}) for question in "ab")
    assert [row.line for row in load(write("set.json", lines))] == [1, 2]


def test_mapped_columns_reach_into_structs(write: Write) -> None:
    path = write("set.jsonl", [{"q": "1+1?", "meta": {"gold": "2"}, "from_where": "school"}])
    columns = ColumnMapping(prompt="q", answer="meta.gold", data_source="from_where")
    (row,) = load(path, columns=columns)
    assert (row.gold, row.data_source) == ("2", "school")


def test_rules_follow_the_data_source_unless_the_dataset_names_one(write: Write) -> None:
    path = write("set.jsonl", [CHAT])
    reward = RewardConfig(rules={"aime": "string", "default": "choice"})
    assert load_rows(DatasetConfig(path=str(path)), reward)[0].rule == "string"
    assert load_rows(DatasetConfig(path=str(path), rule="user"), reward)[0].rule == "user"
    assert load_rows(DatasetConfig(path=str(write("b.jsonl", [PLAIN]))), reward)[0].rule == "choice"


def test_prompt_ids_depend_on_content_only(write: Write) -> None:
    other = {"question": "2+2?", "answer": "4"}
    one = load(write("set.jsonl", [PLAIN, other]))
    two = load(write("set.json", [other, PLAIN]))
    assert {row.prompt_id for row in one} == {row.prompt_id for row in two}
    assert one[0].prompt_id == two[1].prompt_id
    repeated = load(write("set.jsonl", [PLAIN, PLAIN]))
    assert repeated[0].prompt_id != repeated[1].prompt_id


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "1+1?", "answer": None}, ["answer=None", "no gold answer"]),
        ({"question": "1+1?"}, ["answer=None", "no gold answer"]),
        ({"question": "1+1?", "answer": "  "}, ["answer='  '"]),
        ({"question": "", "answer": "2"}, ["question", "empty"]),
        ({"question": None, "answer": "2"}, ["question=None", "expected a text"]),
        ({"text": "1+1?", "label": 2}, ["unknown layout", "label, text", "columns"]),
        ({"prompt": [{"from": "alien", "value": "x"}], "final_answer": "2"}, ["alien", "role"]),
        ({"prompt": [{"role": "assistant", "content": "x"}], "final_answer": "2"}, ["assistant", "user message"]),
        ({"prompt": "write", "final_answer": {}}, ["final_answer={}", "no gold answer"]),
        (["not", "a", "row"], ["expected an object"]),
        ({"question": "1+1? \ud800", "answer": "2"}, [r"'\ud800'", "half of a character"]),
        ({"question": "1+1?", "answer": {"text": "\udfff"}}, [r"'\udfff'", "half of a character"]),
    ],
)
def test_a_bad_row_names_file_line_value_and_fix(write: Write, record: Any, words: list[str]) -> None:
    path = write("set.jsonl", [PLAIN, record])
    with pytest.raises(ConfigError) as error:
        load(path)
    for word in [f"{path}:2", "data.max_bad_rows=1", *words]:
        assert word in str(error.value)
    assert len(load(path, max_bad_rows=1)) == 1


def test_many_bad_rows_are_counted_and_some_listed(write: Write) -> None:
    path = write("set.parquet", [{"question": f"{i}?", "answer": None if i % 2 else "1"} for i in range(40)])
    with pytest.raises(ConfigError, match=r"(?s)20 bad rows.*row 2.*row 10.*15 more") as error:
        load(path)
    assert "row 12" not in str(error.value)
    assert len(load(path, max_bad_rows=20)) == 20
    with pytest.raises(ConfigError, match="max_bad_rows=20"):
        load(path, max_bad_rows=19)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.json", [], "no usable rows"),
        ("empty.jsonl", [], "no usable rows"),
        ("broken.jsonl", None, "broken.jsonl:1: not JSON"),
        ("broken.json", "{", "not JSON"),
        ("tree.json", {"rows": []}, "expected a list of rows, found dict"),
        ("latin.jsonl", b'{"question": "1"}\n{"question": "\xe9"}\n', "latin.jsonl:2: not UTF-8 text"),
        ("latin.json", b'[{"question": "\xe9"}]', "latin.json: not UTF-8 text"),
        ("long.jsonl", b'{"answer": ' + b"7" * 5000 + b"}", "long.jsonl:1: not JSON .*4300 digits"),
        ("long.json", b"[" + b"7" * 5000 + b"]", "long.json: not JSON .*4300 digits"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl:1: not JSON .*recursion"),
        ("deep.json", b"[" * 100_000, "deep.json: not JSON .*recursion"),
        ("table.csv", "a,b", "unknown type .csv; use .parquet"),
        ("broken.parquet", None, "not a readable Parquet file"),
    ],
)
def test_unreadable_files(write: Write, tmp_path: Path, name: str, content: Any, words: str) -> None:
    path = tmp_path / name
    if content is None:
        path.write_text("{broken", encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(name, content)
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: no such file; set data"):
        load(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="is a directory"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"~no-such-user/set\.jsonl: .*from the root"):
        load_rows(DatasetConfig(path="~no-such-user/set.jsonl"), REWARD)
    with pytest.raises(ConfigError, match="a b/set is no name of the hub"):
        load_rows(DatasetConfig(path="hf://datasets/a b/set/train.jsonl"), REWARD)
    with pytest.raises(MissingData, match=r"hf download --repo-type dataset no-such-owner/no-such-set train\.jsonl"):
        load_rows(DatasetConfig(path="hf://datasets/no-such-owner/no-such-set/train.jsonl"), REWARD)


def rows(count: int) -> list[PromptRow]:
    return [PromptRow(f"p{i}", ({"role": "user", "content": str(i)},), "1", "s", "math", i + 1) for i in range(count)]


def take(stream: PromptStream, count: int) -> list[Visit]:
    return [next(stream) for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 12), stop=st.integers(0, 40), seed=st.integers(0, 5))
def test_a_stream_continues_exactly_where_it_stopped(count: int, stop: int, seed: int) -> None:
    whole = take(PromptStream(rows(count), seed=seed), 60)
    first = PromptStream(rows(count), seed=seed)
    take(first, stop)
    second = PromptStream(rows(count), seed=seed)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.prompts_visited == stop
    assert take(second, 60 - stop) == whole[stop:]


def test_every_epoch_visits_every_prompt_once_in_another_order() -> None:
    visits = take(PromptStream(rows(20), seed=3), 60)
    epochs = [visits[0:20], visits[20:40], visits[40:60]]
    for number, epoch in enumerate(epochs):
        assert {visit.row.prompt_id for visit in epoch} == {f"p{i}" for i in range(20)}
        assert {visit.visit for visit in epoch} == {number}
    orders = {tuple(visit.row.prompt_id for visit in epoch) for epoch in epochs}
    assert len(orders) == 3
    assert len({visit.group_id for visit in visits}) == 60
    assert take(PromptStream(rows(20), seed=4), 20) != epochs[0]


def test_the_shuffled_order_is_fixed_for_ever() -> None:
    order = [visit.row.prompt_id for visit in take(PromptStream(rows(6), seed=0), 6)]
    assert order == ["p5", "p1", "p4", "p2", "p3", "p0"]


def test_a_cursor_into_other_data_is_refused() -> None:
    state = PromptStream(rows(5), seed=0).state()
    with pytest.raises(ConfigError, match="the training data changed"):
        PromptStream(rows(6), seed=0).restore(state)
    with pytest.raises(ConfigError, match="seed=7, but the checkpoint was made with seed=0"):
        PromptStream(rows(5), seed=7).restore(state)


def test_a_cursor_of_a_checkpoint_without_a_seed_is_taken() -> None:
    stream = PromptStream(rows(5), seed=3)
    order = take(PromptStream(rows(5), seed=3), 5)
    state = {"epoch": 0, "position": 2, "digest": dataset_digest([visit.row for visit in order])}
    stream.restore(state)
    assert take(stream, 3) == order[2:]
    with pytest.raises(ConfigError, match="same file, limits and seed"):
        PromptStream(rows(5), seed=4).restore(state)


@pytest.mark.parametrize(
    ("name", "count"), [("gsm8k.json", 1319), ("math500.json", 500), ("amc.parquet", 83), ("aime2024.json", 30)]
)
def test_real_questions(shared_dir: Path, name: str, count: int) -> None:
    loaded = load(shared_dir / "data" / name)
    assert len(loaded) == len({row.prompt_id for row in loaded}) == count
    assert all(row.messages[-1]["content"] and row.gold for row in loaded)
