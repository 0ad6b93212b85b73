r"""The string rule that the released SofT-GRPO code trains with, bit-faithful and only for comparison with it.

Last boxed substring anywhere in the response, a fixed list of LaTeX rewrites, string equality. It knows that `1/2`
is `\frac{1}{2}`; it does not know that `1,000` is `1000` or `2.0` is `2`. Where a rewrite fails (a fraction without
operands, a slash between words), the two raw strings are compared, as there.
"""

from __future__ import annotations

_BOX_WITH_SPACE = "\\boxed "
_UNITS = "\\text{ "


class _RewriteError(ValueError):
    """A rewrite met text that it cannot handle."""


def string_match(response: str, gold: str) -> tuple[bool, str | None]:
    """Whether the last boxed answer equals `gold` after the rewrites, and that answer (None if there is none)."""
    boxed = _last_box(response)
    if boxed is None:
        return False, None
    try:
        return _rewrite(boxed) == _rewrite(gold), boxed
    except _RewriteError:
        return boxed == gold, boxed


def _last_box(text: str) -> str | None:
    r"""`\boxed x` up to a dollar sign wins over any braced box; an `\fbox` is found but never accepted."""
    if _BOX_WITH_SPACE in text:
        return text.split(_BOX_WITH_SPACE)[-1].split("$")[0]
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                content = text[start : i + 1]
                return content[len("\\boxed{") : -1] if content.startswith("\\boxed{") else None
    return None


def _rewrite(text: str) -> str:
    for old, new in (
        ("\n", ""),
        ("\\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("\\left", ""),
        ("\\right", ""),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\$", ""),
    ):
        text = text.replace(old, new)
    text = _without_units(text)
    for old, new in (("\\%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    if not text:
        return text
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _with_braced_roots(text).replace(" ", "")
    text = _with_braced_fractions(text)
    if text == "0.5":
        text = "\\frac{1}{2}"
    return _slash_as_fraction(text)


def _without_units(text: str) -> str:
    parts = text.split(_UNITS)
    if len(parts) > 2:
        raise _RewriteError("more than one unit")
    return parts[0]


def _with_braced_roots(text: str) -> str:
    head, *roots = text.split("\\sqrt")
    if any(not root for root in roots):
        raise _RewriteError("a root of nothing")
    return "".join([head, *("\\sqrt" + (r if r[0] == "{" else "{" + r[0] + "}" + r[1:]) for r in roots)])


def _with_braced_fractions(text: str) -> str:
    head, *fractions = text.split("\\frac")
    done = [head]
    for rest in fractions:
        if not rest:
            raise _RewriteError("a fraction of nothing")
        if rest[0] == "{":
            done.append("\\frac" + rest)
        elif len(rest) < 2:
            return text
        else:
            numerator, denominator, tail = rest[0], rest[1], rest[2:]
            braced = denominator if denominator == "{" else "{" + denominator + "}"
            done.append("\\frac{" + numerator + "}" + braced + tail)
    return "".join(done)


def _slash_as_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    try:
        numerator, denominator = int(parts[0]), int(parts[1])
    except ValueError as error:
        raise _RewriteError("a slash between words") from error
    if text != f"{numerator}/{denominator}":
        return text
    return f"\\frac{{{numerator}}}{{{denominator}}}"
