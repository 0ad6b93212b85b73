"""What a receiver is given: the parts of a version as they come out of the object store, copied and read-only."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from rollout.transport import Link, Part, Sender


def stored(sender: Sender, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[list[Part], Link]:
    """Send one version and store its parts."""
    parts: list[Part] = []
    for item in sender.send(version, tensors):
        if isinstance(item, Link):
            return parts, item
        parts.append(stored_part(item))
    raise AssertionError(f"version {version} was sent without a link")


def stored_part(part: Part) -> list[np.ndarray]:
    """A read-only copy."""
    copies = [data.copy() for data in part]
    for copy in copies:
        copy.flags.writeable = False
    return copies
