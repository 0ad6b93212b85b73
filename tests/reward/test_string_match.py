from __future__ import annotations

import json
from pathlib import Path

import pytest

from reward.string_match import string_match

CASES = json.loads((Path(__file__).parent / "golden" / "reward.json").read_text(encoding="utf-8"))


def test_all_golden_cases_are_here() -> None:
    assert len(CASES) == 28


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['text'][:20]}|{case['truth'][:12]}")
def test_agrees_with_the_reference(case: dict[str, object]) -> None:
    equal, _ = string_match(str(case["text"]), str(case["truth"]))
    assert float(equal) == case["score"]


@pytest.mark.parametrize(
    ("response", "gold", "equal"),
    [
        (r"\boxed{\sqrt}", r"\sqrt", True),  # the rewrite fails, the raw strings are equal
        (r"\boxed{\sqrt }", r"\sqrt", False),
        (r"\boxed{m/s}", "m/s", True),
        (r"\boxed{m / s}", "m/s", False),
        (r"\boxed{\frac1}", r"\frac1", True),
        (r"\boxed{\frac12\frac34}", r"\frac{1}{2}\frac{3}{4}", True),
        (r"\boxed{2\text{ a}\text{ b}}", "2", False),
        (r"\boxed{a=b=3}", "3", False),
        (r"\boxed{abc=3}", "3", False),
        (r"\boxed{\frac{1}{2}", "2", False),
    ],
)
def test_follows_the_rewrites_where_they_fail(response: str, gold: str, equal: bool) -> None:
    assert string_match(response, gold)[0] is equal
