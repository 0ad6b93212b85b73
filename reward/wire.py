"""Length-prefixed JSON between verifier and children: data only, so that a child cannot make the parent run code."""

from __future__ import annotations

import json
import struct
from typing import Any

MAX_FRAME_BYTES = 16 * 2**20
_HEADER = struct.Struct(">I")

Message = dict[str, Any]


class WireError(ValueError):
    """Bytes that are not our frames, or a message that cannot be one."""


def encode(message: Message) -> bytes:
    """One frame; lone surrogates survive as escapes. Raises `WireError` for what is not JSON or too long."""
    try:
        body = json.dumps(message, ensure_ascii=True).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"a message is not JSON: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a message of {len(body)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(body)) + body


class FrameReader:
    """Collects bytes and yields complete messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Messages that are complete after these bytes; raises `WireError` on anything else."""
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a frame announces {length} bytes, the limit is {MAX_FRAME_BYTES}")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            try:
                message = json.loads(self._buffer[_HEADER.size : end])
            except (ValueError, RecursionError) as error:
                raise WireError(f"a frame is not JSON: {error}") from error
            if not isinstance(message, dict):
                raise WireError(f"a frame holds a {type(message).__name__} instead of an object")
            messages.append(message)
            del self._buffer[:end]
        return messages
