r"""How people and models write numbers, rewritten to what math-verify reads as it was meant.

math-verify reads `10\,000` as 10 times 0, `1 2` as 3, `1 1/2` as 1 and `5e-05` as a multiple of Euler's number, and
dropping all spaces would make `2, 400` a 2400. Everything here is linear in the length of the text.
"""

from __future__ import annotations

import re

_GAP = r"(?:\s|\\[ ,;:]|~)"
_FROM_UNICODE = str.maketrans({"\N{MINUS SIGN}": "-", "\N{INFINITY}": r"\infty "})
_LEAD = re.compile(r"^(?:(?:\\(?:approx|therefore|implies|Rightarrow|bf|rm|large|Large)(?![A-Za-z])|≈|=>?)\s*)+")
_TYPESET_THOUSANDS = re.compile(
    r"(?<![\d._^])[0-9]+(?:\.[0-9]+)?(?:(?:\\[ ,]|,\\!\s?|~|\{,\}|[\u00a0\u2009\u202f])[0-9]{3})+(?![0-9])"
)
_SPACED_THOUSANDS = re.compile(r"(?<![\w.^\\])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])")
_MIXED = re.compile(rf"(?<![\w.^}}/\\])([0-9]{{1,9}}){_GAP}+([0-9]{{1,9}})/([0-9]{{1,9}})(?![\w.^/])")
_ROW = re.compile(rf"[-+]?[0-9]+(?:\.[0-9]+)?(?:{_GAP}+[0-9]+(?:\.[0-9]+)?)+")
_SCIENTIFIC = re.compile(r"([-+]?[0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]{1,3})")
_SPACE = re.compile(r"\s+")
_KEEPS_APART = re.compile(r"(?<=[0-9,])\s+(?=[0-9,])")


def plain(text: str) -> str:
    """ASCII minus signs, no trailing full stop, no leading relation or font, commas alone between thousands."""
    text = _LEAD.sub("", text.translate(_FROM_UNICODE).strip())
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    return _SPACED_THOUSANDS.sub(_digits, _TYPESET_THOUSANDS.sub(_digits, text))


def readable(text: str) -> str:
    r"""`plain` text as LaTeX: mixed numbers `1 1/2` with a `\frac`, commas in a row of numbers, which is no sum."""
    text = plain(text)
    if _ROW.fullmatch(text):
        return re.sub(rf"{_GAP}+", ", ", text)
    return _MIXED.sub(r"\1\\frac{\2}{\3}", text)


def mixed_number(text: str) -> str | None:
    """The LaTeX of a text that is nothing but a mixed number."""
    match = _MIXED.fullmatch(text.removeprefix("-"))
    return readable(text) if match else None


def scientific(text: str) -> str | None:
    r"""`5e-05` as `5\times10^{-5}`; None for any other text."""
    match = _SCIENTIFIC.fullmatch(text)
    return rf"{match[1]}\times10^{{{int(match[2])}}}" if match else None


def tight(text: str) -> str:
    """Without white space, but for that which keeps two numbers apart."""
    return _SPACE.sub(lambda space: " " if _KEEPS_APART.match(text, space.start()) else "", text)


def _digits(match: re.Match[str]) -> str:
    return re.sub(r"[^0-9.]", "", match.group())
