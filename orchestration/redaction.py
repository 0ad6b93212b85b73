"""Keeping secrets out of what a run writes and sends.

A value is hidden when its key is named like a secret, when it is the password of a URL, or when it equals the value of
an environment variable that is named like a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<redacted>"
SECRET_NAME = re.compile(
    r"(?:^|[._-])(token|password|passwd|secret|credentials?|(?:api|access|private|secret|auth)[_-]?key)(?:$|[._-])",
    re.IGNORECASE,
)
"""Whole words: `hf_token` is a secret, `micro_batch_tokens` is not."""
URL_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*://)[^/@\s:]*:[^/@\s]*@", re.IGNORECASE)
SHORTEST_SECRET = 6
"""Shorter values of secret variables are not searched for: hiding every `true` or `1` would hide everything."""


def redact_text(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` without URL passwords and without the values of secret environment variables."""
    environment = os.environ if environment is None else environment
    text = URL_PASSWORD.sub(rf"\1{HIDDEN}@", text)
    for name, value in environment.items():
        if len(value) >= SHORTEST_SECRET and SECRET_NAME.search(name) and not name.upper().endswith("_PATH"):
            text = text.replace(value, HIDDEN)
    return text


def redact(tree: Any, environment: Mapping[str, str] | None = None) -> Any:
    """A copy of a tree of plain values in which every secret is hidden."""
    if isinstance(tree, Mapping):
        return {
            key: HIDDEN if isinstance(value, str) and SECRET_NAME.search(str(key)) else redact(value, environment)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [redact(value, environment) for value in tree]
    return redact_text(tree, environment) if isinstance(tree, str) else tree
