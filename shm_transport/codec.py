"""Trees of plain values and numpy arrays, as bytes and back.

A tree is None, bool, int, float, str, bytes, list, tuple, dict with str keys, numpy arrays and scalars, dataclasses
marked by ``dive_into``, and torch tensors, which go as arrays. One byte says what a node is, numbers are little-endian::

    N T F            None, True, False
    i q | I u32 raw  int of 64 bits, longer int (two's complement)
    f d              float
    s u32 raw        str (UTF-8);  b: bytes
    l u32 nodes      list;  t: tuple
    d u32 (u32 key, node)...                 dict
    D u32 name u32 (u32 field, node)...      dataclass
    a dtype shape u64 pad raw                array, data here at a multiple of 16
    m dtype shape u64 u64                    array, its bytes and offset in the writer's shared segment
    g, like a                                numpy scalar

dtype: u16 and numpy's type string ("<f4") or, if structured, the literal that .npy files use. shape: u8 and u64 each.
Arrays of Python objects are refused either way, nothing here is pickled, and a decoder believes no number before it has
compared it with the bytes it has.
"""

from __future__ import annotations

import ast
import re
import struct
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import MalformedMessage
from .marks import init_fields, travelling_class

#: arrays of at least so many bytes go through shared memory where there is one
SHARED_FROM = 8192
MAX_DEPTH = 32
MAX_NODES = 1 << 20
INLINE_ALIGNMENT = 16
SHARED_ALIGNMENT = 64  # a cache line

_MAX_INT_BYTES = 1024
_MAX_DTYPE_BYTES = 4096
_OWN_PART_FROM = 1 << 16  # an inline array of so many bytes is sent from where it lies
_SIMPLE_DTYPE = re.compile(r"[<>|=](?:[biufcSUV]\d{1,9}|[mM]8(?:\[\d{0,9}[a-zA-Z]{1,2}\])?)\Z")

_pack_u32 = struct.Struct("<cI").pack
_pack_i64 = struct.Struct("<cq").pack
_pack_f64 = struct.Struct("<cd").pack
_u16, _u32, _i64, _f64 = (struct.Struct("<" + code).unpack_from for code in "HIqd")


class Unsendable(TypeError):
    """A value that cannot travel; ``path`` says where in the tree it is."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason
        self.path: list[str] = []

    def __str__(self) -> str:
        return "".join(reversed(self.path)) + ": " + self.reason if self.path else self.reason


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
            raw = kind.__name__.encode()
            names = init_fields(kind)
            self._out += _pack_u32(b"D", len(raw))
            self._out += raw
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
                raw = name.encode("utf-8", "surrogatepass")
                self._out += struct.pack("<I", len(raw))
                self._out += raw
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
        name = _dtype_name(array.dtype)
        nbytes = array.nbytes
        shared = self._arena is not None and nbytes >= SHARED_FROM and tag == b"a"
        self._out += b"m" if shared else tag
        self._out += name
        self._out += struct.pack(f"<B{array.ndim + 1}Q", array.ndim, *array.shape, nbytes)
        if shared:
            self._out += struct.pack("<Q", self._arena.place(array))
            return
        self._out += bytes(-(self._finished + len(self._out)) % INLINE_ALIGNMENT)
        if nbytes < _OWN_PART_FROM:
            self._out += array.tobytes()
            return
        if not array.flags.c_contiguous:
            array = array.copy(order="C")
        self._parts += [self._out, array.reshape(-1).view(np.uint8).data]
        self._finished += len(self._out) + nbytes
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
            tree = self._node(0)
        except MalformedMessage:
            raise
        except (ValueError, IndexError, struct.error) as error:  # cut short, or text that is not UTF-8
            raise MalformedMessage(f"at byte {self._at} of {self._end}: {error}") from None
        if self._at != self._end:
            raise MalformedMessage(f"{self._end - self._at} bytes after the end of the tree")
        return tree

    def _node(self, depth: int) -> Any:
        at = self._at
        tag = self._buffer[at]
        self._at = at + 1
        if tag == 97 or tag == 109:  # a, m
            return self._array(shared=tag == 109)
        if tag == 115:  # s
            return self._text()
        if tag == 102:  # f
            self._at = at + 9
            return _f64(self._buffer, at + 1)[0]
        if tag == 105:  # i
            self._at = at + 9
            return _i64(self._buffer, at + 1)[0]
        if tag == 78:  # N
            return None
        if tag == 84 or tag == 70:  # T, F
            return tag == 84
        if tag == 100:  # d
            return self._named(depth)
        if tag == 108 or tag == 116:  # l, t
            count = self._count(depth)
            values = [self._node(depth + 1) for _ in range(count)]
            return values if tag == 108 else tuple(values)
        if tag == 98:  # b
            return bytes(self._raw())
        if tag == 103:  # g
            return self._array(shared=False).copy()[()]
        if tag == 73:  # I
            raw = self._raw()
            if len(raw) > _MAX_INT_BYTES:
                raise MalformedMessage(f"an int of {len(raw)} bytes; at most {_MAX_INT_BYTES} travel")
            return int.from_bytes(raw, "little", signed=True)
        if tag == 68:  # D
            return self._dataclass(depth)
        raise MalformedMessage(f"byte {at} is {tag:#04x}, which is no kind of value")

    def _raw(self) -> Any:
        start = self._at + 4
        end = start + _u32(self._buffer, self._at)[0]
        if end > self._end:
            raise MalformedMessage(f"{end - start} bytes are announced at byte {start}, {self._end - start} are there")
        self._at = end
        return self._buffer[start:end]

    def _text(self) -> str:
        return str(self._raw(), "utf-8", "surrogatepass")

    def _count(self, depth: int) -> int:
        count = _u32(self._buffer, self._at)[0]
        self._at += 4
        self._nodes += count
        if depth >= MAX_DEPTH:
            raise MalformedMessage(f"nested deeper than {MAX_DEPTH} levels")
        if count > self._end - self._at or self._nodes > MAX_NODES:
            raise MalformedMessage(
                f"{count} values announced in {self._end - self._at} bytes (at most {MAX_NODES} in all)"
            )
        return count

    def _named(self, depth: int) -> Any:
        count = self._count(depth)
        values = {}
        for _ in range(count):
            name = self._text()
            values[name] = self._node(depth + 1)
        if len(values) != count:
            raise MalformedMessage("a name occurs twice in one dict")
        return values

    def _dataclass(self, depth: int) -> Any:
        name = self._text()
        cls = travelling_class(name)
        if cls is None:
            raise MalformedMessage(f"a dataclass {name!r}, which is not marked with dive_into here")
        values = self._named(depth)
        wanted = init_fields(cls)
        if set(values) != set(wanted):
            raise MalformedMessage(f"{name} has the fields {', '.join(wanted)}; got {', '.join(values)}")
        try:
            return cls(**values)
        except Exception as error:
            raise MalformedMessage(f"{name} refuses its fields: {type(error).__name__}: {error}") from error

    def _array(self, shared: bool) -> np.ndarray:
        buffer = self._buffer
        start = self._at + 2
        end = start + _u16(buffer, self._at)[0]
        dtype = _parse_dtype(bytes(buffer[start:end]))
        ndim = buffer[end]
        if ndim > 32:
            raise MalformedMessage(f"an array of {ndim} dimensions; at most 32 travel")
        *shape, nbytes = struct.unpack_from(f"<{ndim + 1}Q", buffer, end + 1)
        at = end + 1 + 8 * (ndim + 1)
        expected = dtype.itemsize
        for length in shape:
            expected *= length
        if expected != nbytes:
            raise MalformedMessage(f"{dtype} of shape {tuple(shape)} takes {expected} bytes; the header says {nbytes}")
        self._room -= nbytes
        if self._room < 0:
            raise MalformedMessage(f"the arrays of one message take more than the limit; this one has {nbytes} bytes")
        if shared:
            source, limit, where = self._segment, self._used, "segment"
            offset = struct.unpack_from("<Q", buffer, at)[0]
            self._at = at + 8
            if source is None:
                raise MalformedMessage("an array in shared memory, but the message names no segment")
            if offset % SHARED_ALIGNMENT:
                raise MalformedMessage(f"an array at offset {offset}, which is no multiple of {SHARED_ALIGNMENT}")
        else:
            source, limit, where = buffer, self._end, "message"
            offset = at + -at % INLINE_ALIGNMENT
            self._at = offset + nbytes
        if offset + nbytes > limit:
            raise MalformedMessage(f"an array of {nbytes} bytes at {offset} of a {where} of {limit} bytes")
        if nbytes == 0:
            if max(shape) > sys.maxsize // 64:
                raise MalformedMessage(f"an empty array of shape {tuple(shape)}")
            array = np.empty(shape, dtype)
        else:
            array = np.ndarray(shape, dtype, buffer=source, offset=offset)
            if self._copy:
                return array.copy()
        array.flags.writeable = self._copy
        return array


@lru_cache(maxsize=256)
def _dtype_name(dtype: np.dtype) -> bytes:
    """The dtype as it travels: u16 and text."""
    if dtype.hasobject:
        raise Unsendable("an array of Python objects cannot travel; convert it to a numeric or string dtype")
    if dtype.itemsize == 0:
        raise Unsendable(f"an array of {dtype} has elements of no bytes; give them a length")
    text = dtype.str if dtype.names is None else repr(np.lib.format.dtype_to_descr(dtype))
    raw = text.encode()
    try:
        if (
            _parse_dtype(raw) == dtype
        ):  # not so for types that others have added to numpy: they would arrive as raw bytes
            return struct.pack("<H", len(raw)) + raw
    except MalformedMessage:
        pass
    raise Unsendable(f"an array of {dtype} cannot travel; convert it to a standard numpy dtype")


@lru_cache(maxsize=256)
def _parse_dtype(raw: bytes) -> np.dtype:
    if len(raw) > _MAX_DTYPE_BYTES:
        raise MalformedMessage(f"a dtype described in {len(raw)} bytes; at most {_MAX_DTYPE_BYTES}")
    try:
        text = raw.decode()
        if text.startswith("["):
            descr = ast.literal_eval(text)
            _check_fields(descr)
            dtype = np.lib.format.descr_to_dtype(descr)
        else:
            _check_simple(text)
            dtype = np.dtype(text)
    except Exception as error:  # whatever numpy makes of a hostile description
        raise MalformedMessage(f"{raw[:80]!r} is not a dtype that travels ({type(error).__name__}: {error})") from None
    if dtype.hasobject or dtype.itemsize == 0:
        raise MalformedMessage(f"{raw[:80]!r} is not a dtype that travels: it holds objects or nothing")
    return dtype


def _check_simple(text: object) -> None:
    if not isinstance(text, str) or not _SIMPLE_DTYPE.match(text):
        raise ValueError(f"{text!r} is not a plain type string")


def _check_fields(descr: object) -> None:
    """A structured type's description: [(name, type[, shape]), ...], the type a string or again such a list."""
    for field in descr:
        name, kind = field[:2]
        if not isinstance(name, (str, tuple)) or len(field) > 3:
            raise ValueError(f"{field!r} is not a field")
        if isinstance(kind, tuple):  # (type, shape)
            kind = kind[0]
        if isinstance(kind, list):
            _check_fields(kind)
        else:
            _check_simple(kind)
