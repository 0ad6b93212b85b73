"""The letter that an answer to a multiple-choice question chooses: linear-time string work."""

from __future__ import annotations

import re

from reward.extraction import MAX_ANSWER_CHARS, MAX_TEXT_CHARS, Answer, extract_answer

_STYLE = r"(?:text|mathrm|textbf|mathbf)\s?\{"
_STYLED = re.compile(rf"\\{_STYLE}([^{{}}]{{0,64}})\}}")
_LETTER = re.compile(r"\(?\s*([A-Z])\s*\)?(?![A-Za-z])")
_SECOND_OPTION = re.compile(r"(?<![A-Za-z])[A-Z]\s*\)")
_ALTERNATIVE = re.compile(r"[).:]?\s*(?:or\b|and\b|[,/;&])\s*\(?[A-Z](?![A-Za-z])")
_PHRASE = re.compile(
    rf"""(?i:answer|choice|option)
    (?:\ (?:I|we)\ [a-z]{{1,12}})?          # the answer I get
    ["*\s]{{0,4}}
    (?P<mark>(?:is\b\s?:?|[:=])?)
    (?P<opening>[\s"*(\[{{$\\]{{0,8}}(?:{_STYLE}\(?)?)
    (?P<letter>[A-Z])(?![A-Za-z'’])""",
    re.VERBOSE,
)
_OR = re.compile(r"\W{0,4}(?:\Wor\W|/)\W{0,4}[A-Z](?![A-Za-z])")
_END = re.compile(r"[ \t]*(?:[.,;:!()\]\n]|$|(?:is|since|because|as|works|follows|holds)\b)")
_PRONOUN = re.compile(r"\s(?!because|since|as|is)[a-z]")


def choice_letter(answer: Answer) -> str | None:
    """The letter in the box, else that of a short answer, else that of the last phrase such as "the answer is B".

    A phrase with `is` or a colon goes before a mere "option B", which tells what was not chosen as often.
    """
    text = answer.final_text[-MAX_TEXT_CHARS:]
    extracted = extract_answer(answer)
    if extracted is not None and extracted.source == "boxed":
        return letter_in(extracted.text)
    if extracted is not None and extracted.source == "bare" and len(text) <= MAX_ANSWER_CHARS:
        letter = letter_in(extracted.text)
        if letter is not None:
            return letter
    phrases = [match for match in _PHRASE.finditer(text) if _chooses(text, match)]
    chosen = [match for match in phrases if match["mark"]] or phrases
    return chosen[-1]["letter"] if chosen else None


def letter_in(text: str) -> str | None:
    r"""The letter of `B`, `(B)`, `\text{B}`, `B) because`, `(B) 42`; None for words, and for `(A) or (B)`."""
    plain = _STYLED.sub(r"\1", text[:256]).strip(" .*$\n\t")
    match = _LETTER.match(plain)
    if match is None:
        return plain.upper() if len(plain) == 1 and plain.isalpha() and plain.isascii() else None
    end = match.end()
    separated = end == len(plain) or plain[end] in ").:"
    bracketed = ")" in match.group() and not _SECOND_OPTION.search(plain, end)
    return match.group(1) if (separated or bracketed) and not _ALTERNATIVE.match(plain, end) else None


def _chooses(text: str, match: re.Match[str]) -> bool:
    """False for the words "I" and "A" where a letter could stand, and for "A or B"."""
    letter, end = match["letter"], match.end()
    if _OR.match(text, end) or (letter == "I" and _PRONOUN.match(text, end)):
        return False
    marked = match["mark"] or "**" in match.group() or re.search(r'[(\[{$"]', match["opening"])
    return letter not in "AI" or bool(marked) or bool(_END.match(text, end))
