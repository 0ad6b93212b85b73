"""What the documentation says: code blocks, commands, headings, tables, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every line in a bash block; a pipeline counts as several."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                for part in line.split(" | "):
                    if part.strip():
                        found.append((page.name, shlex.split(part)))
    return found


def first_cells(page: Path) -> list[str]:
    """Code spans in the first column of all tables."""
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
