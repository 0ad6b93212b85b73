"""Secrets are hidden by name, by URL and by value; what merely looks like one is not."""

from __future__ import annotations

import pytest

from orchestration.redaction import HIDDEN, redact, redact_text

ENVIRONMENT = {
    "HF_TOKEN": "hf_abcdef",
    "AWS_SECRET_ACCESS_KEY": "abc/def+ghi",
    "MLFLOW_TRACKING_PASSWORD": "passw0rd",
    "RAY_AUTH_TOKEN_PATH": "/home/me/token",
    "TOKENIZERS_PARALLELISM": "false1",
    "SHORT_TOKEN": "1",
    "HOME": "/home/me",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", "plain text"),
        ("login hf_abcdef now", f"login {HIDDEN} now"),
        ("abc/def+ghi", HIDDEN),
        ("http://me:secret@host:5000/x?y=1", f"http://{HIDDEN}@host:5000/x?y=1"),
        ("postgresql+psycopg://u:p@db/mlflow", f"postgresql+psycopg://{HIDDEN}@db/mlflow"),
        ("http://host/a:b@c", "http://host/a:b@c"),
        ("/home/me/token and false1 and 1", "/home/me/token and false1 and 1"),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert redact_text(text, ENVIRONMENT) == expected


@pytest.mark.parametrize(
    "key",
    ["token", "hf_token", "api_key", "api-key", "Password", "aws.secret", "credentials", "private_key", "auth_token"],
)
def test_secret_keys(key: str) -> None:
    assert redact({"a": [{key: "value"}]}, {}) == {"a": [{key: HIDDEN}]}


@pytest.mark.parametrize(
    "key",
    ["micro_batch_tokens", "max_new_tokens", "end_of_thinking", "tokenizer", "keys", "secretary", "passwords_seen"],
)
def test_innocent_keys(key: str) -> None:
    assert redact({key: "value", "n": 3, "b": None}, {}) == {key: "value", "n": 3, "b": None}


def test_every_configuration_key_is_innocent() -> None:
    from orchestration.config import parse_config

    tree = parse_config(
        {"name": "t", "model": {"path": "m"}, "data": {"train": {"path": "d"}}, "algorithm": {}}, "test"
    ).model_dump(mode="json")
    assert redact(tree, {}) == tree
