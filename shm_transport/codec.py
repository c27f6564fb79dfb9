"""Trees of plain values and numpy arrays, as bytes and back.

A tree is None, bool, int, float, str, bytes, list, tuple, dict with str keys, numpy arrays and scalars, dataclasses
marked by ``dive_into``, and torch tensors, which go as arrays. A byte says what a node is, numbers are little-endian::

    N T F            None, True, False
    i q | I u32 raw  int of 64 bits, longer int (two's complement)
    f d              float
    s u32 raw        str (UTF-8);  b: bytes
    l u32 nodes      list;  t: tuple
    d u32 (u32 key, node)...                 dict
    D u32 name u32 (u32 field, node)...      dataclass
    a u16 head pad raw                       array, its data at the next multiple of 16
    m u16 head u64                           array, its data at this offset of the writer's shared segment
    g, like a                                numpy scalar (numpy's str and bytes go as Python's)

The head of an array is described in ``array_head``.
Arrays of Python objects are refused either way, nothing here is pickled, and a decoder believes no number before it has
compared it with the bytes it has.
"""

from __future__ import annotations

import struct
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from .array_head import array_head, parse_head
from .errors import MalformedMessage, Unsendable
from .marks import init_fields, travelling_class

#: arrays of at least so many bytes go through shared memory where there is one
SHARED_FROM = 8192
MAX_DEPTH = 32
MAX_NODES = 1 << 20
INLINE_ALIGNMENT = 16
SHARED_ALIGNMENT = 64  # a cache line

_MAX_INT_BYTES = 1024
_REMEMBERED_NAME = 64  # bytes: the keys of frames recur, and a peer must not fill the memory with others
_OWN_PART_FROM = 1 << 16  # an inline array of so many bytes is sent from where it lies

_pack_u32 = struct.Struct("<cI").pack
_pack_i64 = struct.Struct("<cq").pack
_pack_u64 = struct.Struct("<Q").pack
_pack_f64 = struct.Struct("<cd").pack
_u16, _u32, _u64, _i64, _f64 = (struct.Struct("<" + code).unpack_from for code in "HIQqd")


class Arena:
    """Places for large arrays in a shared segment: given out while encoding, filled once the segment is big enough."""

    def __init__(self) -> None:
        self.size = 0
        self._placed: list[tuple[int, np.ndarray]] = []

    def place(self, array: np.ndarray) -> int:
        """The offset where the array will lie."""
        offset = self.size
        self._placed.append((offset, array))
        self.size = offset + -(-array.nbytes // SHARED_ALIGNMENT) * SHARED_ALIGNMENT
        return offset

    def fill(self, buffer: Any) -> None:
        """Copy the arrays to their places: the one copy on the writer's side."""
        for offset, array in self._placed:
            np.ndarray(array.shape, array.dtype, buffer=buffer, offset=offset)[...] = array


class Encoder:
    """Encodes one tree. With an arena, arrays from ``SHARED_FROM`` bytes on are placed there."""

    def __init__(self, arena: "Arena | None" = None):
        self._arena = arena
        self._out = bytearray()
        self._parts: list[Any] = []
        self._finished = 0  # bytes in self._parts
        self._nodes = 0

    def encode(self, tree: Any) -> list[Any]:
        """The message as parts to send one after another (bytes-like).

        Raises Unsendable (a TypeError) for a value that cannot travel, ValueError beyond the limits."""
        self._node(tree, 0)
        self._parts.append(self._out)
        return self._parts

    def _node(self, x: Any, depth: int) -> None:
        kind = type(x)
        if kind is np.ndarray:
            self._array(x, b"a")
        elif kind is str:
            raw = x.encode("utf-8", "surrogatepass")
            self._out += _pack_u32(b"s", len(raw))
            self._out += raw
        elif kind is float:
            self._out += _pack_f64(b"f", x)
        elif kind is int:
            self._int(x)
        elif x is None:
            self._out += b"N"
        elif kind is bool:
            self._out += b"T" if x else b"F"
        elif kind is dict:
            self._out += _pack_u32(b"d", len(x))
            self._named(x.items(), depth, dict)
        elif kind is list or kind is tuple:
            self._sequence(x, b"l" if kind is list else b"t", depth)
        elif kind is bytes:
            self._out += _pack_u32(b"b", len(x))
            self._out += x
        else:
            self._other(x, kind, depth)

    def _other(self, x: Any, kind: type, depth: int) -> None:
        """The kinds that are rare, so that the common ones are found first."""
        torch = sys.modules.get("torch")  # whoever has a tensor has imported it
        if isinstance(x, (np.str_, np.bytes_)):
            self._node(x.item(), depth)
        elif isinstance(x, np.generic):
            self._array(np.asarray(x), b"g")
        elif kind is np.memmap:
            self._array(x.view(np.ndarray), b"a")
        elif torch is not None and isinstance(x, torch.Tensor):
            try:
                array = x.detach().cpu().resolve_conj().resolve_neg().numpy()
            except (TypeError, RuntimeError) as error:
                raise Unsendable(f"a tensor of {x.dtype}, {x.layout} has no numpy form ({error}); convert it") from None
            self._array(array, b"a")
        elif travelling_class(kind.__name__) is kind:
            names = init_fields(kind)
            self._out += b"D" + _name(kind.__name__)
            self._out += struct.pack("<I", len(names))
            self._named([(name, getattr(x, name)) for name in names], depth, kind)
        else:
            raise Unsendable(
                f"a {kind.__module__}.{kind.__qualname__} cannot travel; send numbers, strings, bytes, lists, tuples, "
                "dicts, numpy arrays, or a dataclass marked with dive_into"
            )

    def _int(self, x: int) -> None:
        if -(1 << 63) <= x < 1 << 63:
            self._out += _pack_i64(b"i", x)
            return
        raw = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
        if len(raw) > _MAX_INT_BYTES:
            raise ValueError(f"an int of {len(raw)} bytes; at most {_MAX_INT_BYTES} travel")
        self._out += _pack_u32(b"I", len(raw))
        self._out += raw

    def _enter(self, count: int, depth: int) -> None:
        self._nodes += count
        if depth >= MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels (or a cycle)")
        if self._nodes > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} values in one message; send long lists as arrays")

    def _named(self, items: Any, depth: int, kind: type) -> None:
        self._enter(len(items), depth)
        name = None
        try:
            for name, value in items:
                if type(name) is not str:
                    raise Unsendable(f"the key {name!r} is not a str; dicts travel with str keys only")
                self._out += _name(name)
                self._node(value, depth + 1)
        except Unsendable as error:
            error.path.append(f"[{name!r}]" if kind is dict else f".{name}")
            raise

    def _sequence(self, values: Any, tag: bytes, depth: int) -> None:
        self._enter(len(values), depth)
        self._out += _pack_u32(tag, len(values))
        index = 0
        try:
            for index, value in enumerate(values):  # noqa: B007 (used where it fails)
                self._node(value, depth + 1)
        except Unsendable as error:
            error.path.append(f"[{index}]")
            raise

    def _array(self, array: np.ndarray, tag: bytes) -> None:
        nbytes = array.nbytes
        shared = self._arena is not None and nbytes >= SHARED_FROM and tag == b"a"
        out = self._out
        out += b"m" if shared else tag
        out += array_head(array.dtype, array.shape)
        if shared:
            out += _pack_u64(self._arena.place(array))
            return
        out += bytes(-(self._finished + len(out)) % INLINE_ALIGNMENT)
        if nbytes < _OWN_PART_FROM:
            out += array.tobytes()
            return
        if not array.flags.c_contiguous:
            array = array.copy(order="C")
        self._parts += [out, array.reshape(-1).view(np.uint8).data]
        self._finished += len(out) + nbytes
        self._out = bytearray()


class Decoder:
    """Decodes one tree.

    ``buffer``: the message, bytes or a read-only memoryview. ``segment``: the writer's shared segment, and of it the
    first ``used`` bytes. ``copy``: arrays are the caller's own; else read-only views on the message or the segment.
    ``max_bytes`` bounds what all arrays together may take."""

    def __init__(self, buffer: Any, segment: Any = None, used: int = 0, copy: bool = False, max_bytes: int = 1 << 31):
        self._buffer = buffer
        self._end = len(buffer)
        self._at = 0
        self._segment = segment
        self._used = used
        self._copy = copy
        self._room = max_bytes
        self._nodes = 0

    def decode(self) -> Any:
        """The tree. Raises MalformedMessage where the bytes are not one."""
        try:
            tree = self._node(0, 0)
        except MalformedMessage:
            raise
        except (ValueError, IndexError, struct.error) as error:  # cut short, or text that is not UTF-8
            raise MalformedMessage(f"at byte {self._at} of {self._end}: {error}") from None
        if self._at != self._end:
            raise MalformedMessage(f"{self._end - self._at} bytes after the end of the tree")
        return tree

    def _node(self, at: int, depth: int) -> Any:
        """The value that begins at ``at``; its end is left in ``self._at``, as by every reader below."""
        reader = self._READERS.get(self._buffer[at])
        if reader is None:
            raise MalformedMessage(f"byte {at} is {self._buffer[at]:#04x}, which is no kind of value")
        return reader(self, at + 1, depth)

    def _none(self, at: int, depth: int) -> None:
        self._at = at

    def _true(self, at: int, depth: int) -> bool:
        self._at = at
        return True

    def _false(self, at: int, depth: int) -> bool:
        self._at = at
        return False

    def _int(self, at: int, depth: int) -> int:
        self._at = at + 8
        return _i64(self._buffer, at)[0]

    def _long_int(self, at: int, depth: int) -> int:
        raw = self._bytes(at, depth)
        if len(raw) > _MAX_INT_BYTES:
            raise MalformedMessage(f"an int of {len(raw)} bytes; at most {_MAX_INT_BYTES} travel")
        return int.from_bytes(raw, "little", signed=True)

    def _float(self, at: int, depth: int) -> float:
        self._at = at + 8
        return _f64(self._buffer, at)[0]

    def _bytes(self, at: int, depth: int) -> bytes:
        start = at + 4
        end = start + _u32(self._buffer, at)[0]
        if end > self._end:
            raise MalformedMessage(f"{end - start} bytes are announced at byte {start}, {self._end - start} are there")
        self._at = end
        return bytes(self._buffer[start:end])

    def _text(self, at: int, depth: int) -> str:
        return self._bytes(at, depth).decode("utf-8", "surrogatepass")

    def _list(self, at: int, depth: int) -> list:
        count = self._count(at, depth)
        return [self._node(self._at, depth + 1) for _ in range(count)]

    def _tuple(self, at: int, depth: int) -> tuple:
        return tuple(self._list(at, depth))

    def _dict(self, at: int, depth: int) -> dict[str, Any]:
        count = self._count(at, depth)
        buffer = self._buffer
        values = {}
        for _ in range(count):
            at = self._at
            end = at + 4 + _u32(buffer, at)[0]
            values[_parse_name(bytes(buffer[at + 4 : end]))] = self._node(end, depth + 1)
        if len(values) != count:
            raise MalformedMessage("a name occurs twice in one dict")
        return values

    def _count(self, at: int, depth: int) -> int:
        """How many values follow; no more than could be there."""
        count = _u32(self._buffer, at)[0]
        self._at = at + 4
        self._nodes += count
        if depth >= MAX_DEPTH:
            raise MalformedMessage(f"nested deeper than {MAX_DEPTH} levels")
        if count > self._end - self._at or self._nodes > MAX_NODES:
            raise MalformedMessage(f"{count} values announced in {self._end - self._at} bytes, {MAX_NODES} at most")
        return count

    def _dataclass(self, at: int, depth: int) -> Any:
        name = self._text(at, depth)
        cls = travelling_class(name)
        if cls is None:
            raise MalformedMessage(f"a dataclass {name!r}, which is not marked with dive_into here")
        values = self._dict(self._at, depth)
        wanted = init_fields(cls)
        if set(values) != set(wanted):
            raise MalformedMessage(f"{name} has the fields {', '.join(wanted)}; got {', '.join(values)}")
        try:
            return cls(**values)
        except Exception as error:
            raise MalformedMessage(f"{name} refuses its fields: {type(error).__name__}: {error}") from error

    def _inline_array(self, at: int, depth: int) -> np.ndarray:
        head, at = self._head(at)
        offset = at + -at % INLINE_ALIGNMENT
        self._at = offset + head[2]
        return self._view(head, self._buffer, offset, self._end)

    def _shared_array(self, at: int, depth: int) -> np.ndarray:
        head, at = self._head(at)
        offset = _u64(self._buffer, at)[0]
        self._at = at + 8
        if self._segment is None:
            raise MalformedMessage("an array in shared memory, but the message names no segment")
        if offset % SHARED_ALIGNMENT:
            raise MalformedMessage(f"an array at offset {offset}, which is no multiple of {SHARED_ALIGNMENT}")
        return self._view(head, self._segment, offset, self._used)

    def _scalar(self, at: int, depth: int) -> np.generic:
        return self._inline_array(at, depth).copy()[()]

    def _head(self, at: int) -> tuple[tuple[np.dtype, tuple[int, ...], int], int]:
        start = at + 2
        end = start + _u16(self._buffer, at)[0]
        return parse_head(bytes(self._buffer[start:end])), end

    def _view(self, head: tuple[np.dtype, tuple[int, ...], int], source: Any, offset: int, limit: int) -> np.ndarray:
        dtype, shape, nbytes = head
        if offset + nbytes > limit:
            raise MalformedMessage(f"an array of {nbytes} bytes at {offset} of {limit}")
        self._room -= nbytes
        if self._room < 0:
            raise MalformedMessage(f"the arrays of one message take more than the limit; this one has {nbytes} bytes")
        if nbytes == 0:
            array = np.empty(shape, dtype)
            array.flags.writeable = self._copy
            return array
        array = np.ndarray(shape, dtype, source, offset)  # read-only, as its source is
        return array.copy() if self._copy else array

    _READERS = {
        ord(b"N"): _none,
        ord(b"T"): _true,
        ord(b"F"): _false,
        ord(b"i"): _int,
        ord(b"I"): _long_int,
        ord(b"f"): _float,
        ord(b"s"): _text,
        ord(b"b"): _bytes,
        ord(b"l"): _list,
        ord(b"t"): _tuple,
        ord(b"d"): _dict,
        ord(b"D"): _dataclass,
        ord(b"a"): _inline_array,
        ord(b"m"): _shared_array,
        ord(b"g"): _scalar,
    }


def _name(name: str) -> bytes:
    """A key, or a field's name, as it travels: u32 and text."""
    return _remembered_name(name) if len(name) <= _REMEMBERED_NAME else _packed_name(name)


def _parse_name(raw: bytes) -> str:
    return _remembered_text(raw) if len(raw) <= _REMEMBERED_NAME else raw.decode("utf-8", "surrogatepass")


def _packed_name(name: str) -> bytes:
    raw = name.encode("utf-8", "surrogatepass")
    return struct.pack("<I", len(raw)) + raw


@lru_cache(maxsize=1024)
def _remembered_name(name: str) -> bytes:
    return _packed_name(name)


@lru_cache(maxsize=1024)
def _remembered_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")
