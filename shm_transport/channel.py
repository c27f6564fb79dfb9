"""One end of a client-server pair: trees out and in over one socket, large arrays through shared memory.

Each side writes to a segment of its own and reads the other's. A call and its reply take turns, so a segment is never
written while the other side may look at it.

The payload is a prelude (u16 length of the segment's name, 6 bytes of zero, u64 bytes used of it, the name, padded to
16) and the tree.
"""

from __future__ import annotations

import secrets
import struct
from typing import Any

from . import wire
from .decoder import Decoder
from .encoder import Arena, Encoder
from .errors import MalformedMessage
from .segments import Segment, SegmentReader, SegmentWriter, available, open_segment
from .tree_format import INLINE_ALIGNMENT

_PRELUDE = struct.Struct("<HxxxxxxQ")
_NO_SEGMENT = _PRELUDE.pack(0, 0)
_MAX_NAME = 256
TOKEN_BYTES = 32


class Channel:
    """``shared``: whether both ends see one /dev/shm, as the handshake has found out. ``writes_inline``: this end's
    arrays go through the socket all the same, for it may close, and remove its segment, before the other has read."""

    def __init__(self, stream: wire.Stream, max_bytes: int):
        self.stream = stream
        self.max_bytes = max_bytes
        self.shared = False
        self.writes_inline = False
        self.sent_bytes = 0
        self.received_bytes = 0
        self._writer = SegmentWriter(max_bytes)
        self._reader = SegmentReader()

    @property
    def segments_created(self) -> int:
        """How often this end has allocated shared memory."""
        return self._writer.created

    def encode(self, tree: Any) -> list[Any]:
        """The payload of a message, its large arrays put in place. Raises TypeError for a value that cannot travel,
        ValueError for a message beyond the limits."""
        if self.shared and not self.writes_inline:
            arena = Arena()
            parts = Encoder(arena).encode(tree)
            if arena.size == 0:
                return self._checked([_NO_SEGMENT, *parts], 0)
            if self._writer.reserve(arena.size):
                segment = self._writer.segment
                arena.fill(segment.buffer)
                name = segment.name.encode()
                prelude = _PRELUDE.pack(len(name), arena.size) + name
                return self._checked([prelude + bytes(-len(prelude) % INLINE_ALIGNMENT), *parts], arena.size)
        return self._checked([_NO_SEGMENT, *Encoder().encode(tree)], 0)

    def _checked(self, parts: list[Any], shared_bytes: int) -> list[Any]:
        size = sum(len(part) for part in parts) + shared_bytes
        if size > self.max_bytes:
            raise ValueError(f"a message of {size} bytes; at most {self.max_bytes} travel at once")
        self.sent_bytes += size
        return parts

    def decode(self, data: Any, copy: bool) -> Any:
        """The tree in a payload. Arrays are the caller's own if ``copy``, else read-only views that the next message
        overwrites. Raises MalformedMessage."""
        if len(data) < _PRELUDE.size:
            raise MalformedMessage(f"a payload of {len(data)} bytes")
        name_size, used = _PRELUDE.unpack_from(data)
        start = _PRELUDE.size + name_size
        start += -start % INLINE_ALIGNMENT
        segment = None
        if name_size:
            if not self.shared:
                raise MalformedMessage("a shared segment, but no shared memory was agreed on")
            if name_size > _MAX_NAME or start > len(data):
                raise MalformedMessage(f"a segment's name of {name_size} bytes")
            name = bytes(data[_PRELUDE.size : _PRELUDE.size + name_size]).decode("ascii", "replace")
            segment = self._reader.map(name, used)
        self.received_bytes += len(data) + used
        body = memoryview(data)[start:] if start < len(data) else b""
        if len(body) < 1 << 16:
            body = bytes(body)  # quicker to take apart
        return Decoder(body, segment, used, copy, self.max_bytes).decode()

    def close(self) -> None:
        """Close the connection and give the shared memory back."""
        self.stream.close()
        self._writer.close()
        self._reader.close()


class Probe:
    """Finds out whether two processes see one /dev/shm: one puts a random token in a segment and names it, the other
    says what it reads there. Host names would not do: containers share them without sharing memory."""

    def __init__(self) -> None:
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._segment: Segment | None = None
        if available():
            try:
                self._segment = Segment(TOKEN_BYTES)
                self._segment.buffer[:TOKEN_BYTES] = self._token
            except OSError:
                self._segment = None  # full, or not writable: as if there were none

    @property
    def name(self) -> str | None:
        """The segment's name, or None where there is no shared memory."""
        return self._segment.name if self._segment is not None else None

    def confirms(self, answer: object) -> bool:
        """Whether the other side has read the token."""
        return isinstance(answer, bytes) and secrets.compare_digest(answer, self._token)

    def close(self) -> None:
        """Remove the segment."""
        if self._segment is not None:
            self._segment.close()


def answer_probe(name: str | None) -> bytes | None:
    """The token in the other side's segment; None if it cannot be read here."""
    if name is None:
        return None
    try:
        mapped = open_segment(name)
    except MalformedMessage:
        return None
    with mapped:
        return mapped[:] if len(mapped) == TOKEN_BYTES else None  # else it is data, and nobody's to read out
