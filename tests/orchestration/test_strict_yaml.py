"""Strict YAML: no key is lost, merges work, and whatever cannot be read is a YAMLError."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from orchestration import strict_yaml


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pipeline: {a: 1}\nname: t\npipeline: {b: 1}\n", ["'pipeline' a second time", "line 3"]),
        ("a: 1\n'a': 2\n", ["'a' a second time", "line 2"]),
        ("1: x\n0x1: y\n", ["1 a second time"]),
        ("outer: [{inner: 1, inner: 1}]", ["'inner' a second time"]),
        ("base: &b {x: 1, x: 2}\nderived: {<<: *b}", ["'x' a second time"]),
        ("a: 1\nday: 2024-02-30", ["2024-02-30", "line 2"]),
        ("0b_", ["0b_"]),
        ("!!bool nonsense", ["nonsense"]),
        ("!!timestamp nonsense", ["nonsense"]),
        ("9" * 5000, ["999"]),
        (r'"\ud800"', ["surrogate"]),
        ("[" * 5000, ["nested too deeply"]),
        ("a: &a {b: [*a]}", ["*a stands inside of what it names"]),
        ("a: &a [1, &b {c: *b}]", ["*b stands inside of what it names"]),
        ("{a: [}", ["line 1"]),
        ("a: 1\n---\nb: 2", ["single document"]),
        ("? [1, 2]\n: x", ["unhashable"]),
    ],
)
def test_what_cannot_be_read_faithfully_is_a_yaml_error(text: str, words: list[str]) -> None:
    with pytest.raises(yaml.YAMLError) as error:
        strict_yaml.load(text)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("1.0e-3", 1e-3),
        ("a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}", {"a": {"x": 1, "y": 1}, "b": {"x": 1, "y": 2}}),
        (
            "b: &b {<<: &a {x: 1}, x: 2}\nc: [{<<: [*b, *a], x: 3}]",
            {"b": {"x": 2}, "c": [{"x": 3}]},
        ),
        ("c: {<<: {<<: {x: 1}, x: 2}, x: 3}", {"c": {"x": 3}}),
        ("a: &a [1]\nb: *a", {"a": [1], "b": [1]}),
    ],
)
def test_everything_else_reads_as_with_the_safe_loader(text: str, expected: Any) -> None:
    assert strict_yaml.load(text) == expected == yaml.safe_load(text)


def test_several_documents() -> None:
    assert strict_yaml.load_all("a: 1\n---\na: 2\n") == [{"a": 1}, {"a": 2}]
    with pytest.raises(yaml.YAMLError, match="'a' a second time"):
        strict_yaml.load_all("a: 1\n---\na: 2\na: 3\n")
