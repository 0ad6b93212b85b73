"""Finding the final answer in a response: linear-time string work that is safe on hostile text.

Everything here runs in the verifier's own process, so nothing may backtrack, recurse or parse mathematics.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_TEXT_CHARS = 200_000
"""Only the tail of a response is searched."""
MAX_ANSWER_CHARS = 1024
"""A 400-term sum takes math-verify 4.5 s, and no gold answer of a known benchmark is longer than 160."""
MAX_NESTING = 24
"""300 nested parentheses take the LaTeX grammar 3.6 s."""
MAX_BARE_CHARS = 256
"""A response as short as this that has no box is itself the answer."""
MAX_PHRASES = 16
"""How far back an answer is looked for where the response ends with remarks on it."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_PHRASE = re.compile(r"####|answer(?:\*\*)?\s?(?:is|:|=)(?:\*\*)?:?", re.IGNORECASE)
_DISPLAY = re.compile(r"\$\$([^$]+)\$\$|\\\[(.+?)\\\]", re.DOTALL)
_REMARK = re.compile(
    r"(?:(?:very|quite|indeed|now|also|really) )?(?:helpful|useful|clear|correct|right|"
    r"reasonable|consistent|valid|plausible|understandable|satisfactory|good|fine|complete|what|as|in|based)\b[^\d$\\]*$",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?]\s+(?=[A-Z])")
_MATHEMATICS = re.compile(r"[\d$\\]")
_OPENING = frozenset("([{")
_CLOSING = frozenset(")]}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rule may look at."""

    response_text: str
    answer_text: str = ""
    """The part after the end of thinking; empty if thinking never ended."""
    finish_reason: str = "stop"
    """stop | length"""
    num_tokens: int | None = None
    """Length of the whole response; None where only text is known."""

    @property
    def final_text(self) -> str:
        """The text that should hold the final answer: after the thinking, or everything if it never ended."""
        return self.answer_text or self.response_text


@dataclass(frozen=True, slots=True)
class Extracted:
    """A final answer as found in a text."""

    text: str
    source: str
    """boxed | phrase (after "the answer is", "####") | bare (no marker)"""


def extract_answer(answer: Answer) -> Extracted | None:
    """The last box, else what follows the last answer phrase, else a bare answer where thinking has ended.

    A response whose thinking never ended counts only with an explicit marker: its last number is not an answer.
    """
    text = answer.final_text[-MAX_TEXT_CHARS:]
    boxed = last_boxed(text)
    if boxed is not None:
        return Extracted(boxed, "boxed")
    if _BOX.search(text):
        return None
    phrase = final_phrase(text)
    if phrase:
        return Extracted(phrase, "phrase")
    short = len(text) <= MAX_BARE_CHARS
    if text.strip() and (answer.answer_text or (short and answer.finish_reason != "length")):
        return Extracted(text.strip() if short else text[-MAX_ANSWER_CHARS:], "bare")
    return None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` (or `\boxed x`); None without one, or if the last one never closes."""
    matches = list(_BOX.finditer(text))
    if not matches:
        return None
    start = matches[-1].end()
    while start < len(text) and text[start] == " ":
        start += 1
    if start < len(text) and text[start] == "{":
        return _braced(text, start)
    word = re.match(r"[^\s$]{1,64}", text[start:])
    return word.group().rstrip(".,;") if word else None


def _braced(text: str, start: int) -> str | None:
    """Content of the brace group that opens at `start`; escaped braces do not count."""
    depth, i = 0, start
    while i < len(text):
        character = text[i]
        if character == "\\":
            i += 2
            continue
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : i].strip()
        i += 1
    return None


def final_phrase(text: str) -> str | None:
    """What follows the last "answer is", "answer:" or "####": a display, or the rest of the line without full stop.

    "I hope this answer is helpful" is no answer: remarks go before an earlier phrase that holds mathematics.
    """
    ends = [match.end() for match in _PHRASE.finditer(text)]
    if not ends:
        return None
    last = _after_phrase(text, ends[-1])
    if last and not _REMARK.match(last):
        return last
    earlier = (_SENTENCE_END.split(_after_phrase(text, end), maxsplit=1)[0] for end in reversed(ends[-MAX_PHRASES:-1]))
    return next((phrase for phrase in earlier if _MATHEMATICS.search(phrase)), last) or None


def _after_phrase(text: str, end: int) -> str:
    rest = text[end : end + MAX_ANSWER_CHARS].lstrip()
    display = _DISPLAY.match(rest)
    if display:
        return f"${' '.join((display[1] or display[2]).split())}$"
    return rest.split("\n", 1)[0].strip().strip("*").strip().removesuffix(".").strip()


def nesting_depth(text: str) -> int:
    """Deepest nesting of brackets; unbalanced text counts as deep as it ever opened."""
    depth = deepest = 0
    for character in text:
        if character in _OPENING:
            depth += 1
            deepest = max(deepest, depth)
        elif character in _CLOSING:
            depth -= 1
    return deepest


def refuse_oversized(text: str) -> str:
    """Why this answer is not given to a parser, or an empty string."""
    if len(text) > MAX_ANSWER_CHARS:
        return f"the extracted answer has {len(text)} characters, the limit is {MAX_ANSWER_CHARS}"
    depth = nesting_depth(text)
    if depth > MAX_NESTING:
        return f"the extracted answer nests {depth} deep, the limit is {MAX_NESTING}"
    return ""
