"""One line of the report of `softgrpo doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` says what to do where `state` is not ok."""

    name: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""
