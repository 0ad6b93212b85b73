"""Types of command-line arguments, with messages for what they refuse."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return value
