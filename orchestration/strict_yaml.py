"""YAML as people mean it: `yaml.SafeLoader`, except that no key is dropped in silence and every refusal is a YAMLError.

PyYAML keeps the last of two equal keys, so that a recipe with two `pipeline:` sections would lose the first; here the
second is an error with its line. Merge keys (`<<`) work as ever: what a mapping says itself wins over what it merges.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

MERGE = "tag:yaml.org,2002:merge"


def load(text: str) -> Any:
    """The one document of `text`, None if there is none; raises `yaml.YAMLError`."""
    documents = load_all(text)
    if len(documents) > 1:
        raise yaml.YAMLError(f"expected a single document, found {len(documents)}")
    return documents[0] if documents else None


def load_all(text: str) -> list[Any]:
    """All documents of `text`; raises `yaml.YAMLError`."""
    documents = []
    try:
        loader = _StrictLoader(text)
        try:
            while loader.check_data():
                documents.append(loader.get_data())
        finally:
            loader.dispose()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    return documents


class _StrictLoader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: list[Any] = []
        """Anchors of the collections that are being read."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse a collection that is part of itself: whoever walks it would not end."""
        if self.check_event(yaml.AliasEvent) and self.peek_event().anchor in self._open:
            event = self.get_event()
            raise ComposerError(None, None, f"*{event.anchor} stands inside of what it names", event.start_mark)
        return super().compose_node(parent, index)

    def compose_sequence_node(self, anchor: Any) -> yaml.SequenceNode:
        self._open.append(anchor)
        node: yaml.SequenceNode = super().compose_sequence_node(anchor)
        self._open.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Look at the keys here, before merging adds those of other mappings."""
        self._open.append(anchor)
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        self._open.pop()
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise ConstructorError(
                    "in a mapping", node.start_mark, f"found the key {key!r} a second time", key_node.start_mark
                )
            seen.add(key)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The safe constructors let errors of Python through: `2024-02-30` is a ValueError, `!!bool x` a KeyError."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()
        except (ValueError, LookupError, ArithmeticError, AttributeError) as error:
            if not isinstance(node, yaml.ScalarNode):
                raise
            message = f"{node.value[:80]!r} is no {node.tag.rpartition(':')[2]}: {str(error)[:200]}"
            raise ConstructorError(None, None, message, node.start_mark) from None
        return value
