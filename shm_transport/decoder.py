"""Bytes to trees, as ``tree_format`` describes them.

A form is taken apart once and remembered as functions that build its tree from the values of a message.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, Callable, NamedTuple

import numpy as np

from .array_head import parse_head
from .errors import MalformedMessage
from .marks import init_fields, travelling_class
from .tree_format import INLINE_ALIGNMENT, MAX_DEPTH, MAX_INT_BYTES, MAX_NODES, SHARED_ALIGNMENT

_REMEMBERED_FORM = 1 << 14  # bytes: a robot sends the same few, and a peer must not fill the memory with others
_u16, _u32 = (struct.Struct("<" + code).unpack_from for code in "HI")


class Decoder:
    """Decodes one tree.

    ``buffer``: the message, bytes or a read-only memoryview. ``segment``: the writer's shared segment, and of it the
    first ``used`` bytes. ``copy``: arrays are the caller's own; else read-only views on the message or the segment.
    ``max_bytes`` bounds what all arrays together may take."""

    def __init__(self, buffer: Any, segment: Any = None, used: int = 0, copy: bool = False, max_bytes: int = 1 << 31):
        self._buffer = buffer
        self._segment = segment
        self._used = used
        self._copy = copy
        self._max_bytes = max_bytes
        self._at = 0  # in the message: the next raw bytes
        self.number: Callable[[], Any]  # the next number

    def decode(self) -> Any:
        """The tree. Raises MalformedMessage where the bytes are not one."""
        try:
            return self._tree()
        except MalformedMessage:
            raise
        except (ValueError, IndexError, struct.error) as error:  # cut short, or text that is not UTF-8
            raise MalformedMessage(f"a message of {len(self._buffer)} bytes: {error}") from None

    def _tree(self) -> Any:
        buffer = self._buffer
        at = 4 + _u32(buffer)[0]
        if at > len(buffer):
            raise MalformedMessage(f"a form of {at - 4} bytes in a message of {len(buffer)}")
        form = parse_form(bytes(buffer[4:at]))
        if form.array_bytes > self._max_bytes:
            raise MalformedMessage(f"arrays of {form.array_bytes} bytes, more than the limit of {self._max_bytes}")
        self.number = iter(form.numbers.unpack_from(buffer, at)).__next__
        at += form.numbers.size
        self._at = at + -at % INLINE_ALIGNMENT
        tree = form.build(self)
        if self._at != len(buffer):
            raise MalformedMessage(f"the tree ends at byte {self._at} of {len(buffer)}")
        return tree

    def raw(self) -> bytes:
        """The next raw bytes, as many as the next number says."""
        start = self._at
        end = start + self.number()
        if end > len(self._buffer):
            raise MalformedMessage(f"{end - start} bytes are announced at byte {start} of {len(self._buffer)}")
        self._at = end
        return bytes(self._buffer[start:end])

    def inline_array(self, dtype: np.dtype, shape: tuple[int, ...], nbytes: int) -> np.ndarray:
        """An array in the raw bytes."""
        start = self._at + -self._at % INLINE_ALIGNMENT
        self._at = start + nbytes
        if self._at > len(self._buffer):
            raise MalformedMessage(f"an array of {nbytes} bytes at {start} of {len(self._buffer)}")
        return self._view(dtype, shape, nbytes, self._buffer, start)

    def shared_array(self, dtype: np.dtype, shape: tuple[int, ...], nbytes: int) -> np.ndarray:
        """An array in the segment, at the next number."""
        start = self.number()
        if self._segment is None:
            raise MalformedMessage("an array in shared memory, but the message names no segment")
        if start % SHARED_ALIGNMENT or start + nbytes > self._used:
            raise MalformedMessage(
                f"an array of {nbytes} bytes at {start} of {self._used}; wanted inside, at a multiple of "
                f"{SHARED_ALIGNMENT}"
            )
        return self._view(dtype, shape, nbytes, self._segment, start)

    def _view(self, dtype: np.dtype, shape: tuple[int, ...], nbytes: int, source: Any, start: int) -> np.ndarray:
        if nbytes == 0:
            array = np.empty(shape, dtype)
            array.flags.writeable = self._copy
            return array
        array = np.ndarray(shape, dtype, source, start)  # read-only, as its source is
        return array.copy() if self._copy else array


_Build = Callable[[Decoder], Any]


class Form(NamedTuple):
    """A form, ready for values. ``numbers``: how they lie in a message; ``array_bytes``: of all arrays together."""

    build: _Build
    numbers: struct.Struct
    array_bytes: int


def parse_form(raw: bytes) -> Form:
    """Raises MalformedMessage, or ValueError, IndexError or struct.error, for what is not one."""
    return _remembered(raw) if len(raw) <= _REMEMBERED_FORM else _FormReader(raw).read()


@lru_cache(maxsize=64)
def _remembered(raw: bytes) -> Form:
    return _FormReader(raw).read()


class _FormReader:
    """Takes one form apart, node by node."""

    def __init__(self, raw: bytes) -> None:
        self.codes: list[str] = []  # of the numbers, as struct has them
        self.array_bytes = 0
        self._raw = raw
        self._at = 0
        self._nodes = 0

    def read(self) -> Form:
        build = self.node(0)
        if self._at != len(self._raw):
            raise MalformedMessage(f"{len(self._raw) - self._at} bytes after the end of the form")
        return Form(build, struct.Struct("<" + "".join(self.codes)), self.array_bytes)

    def node(self, depth: int) -> _Build:
        tag = self.take(1)
        read = _READERS.get(tag)
        if read is None:
            raise MalformedMessage(f"byte {self._at - 1} of the form is {tag[0]:#04x}, which is no kind of value")
        return read(self, depth)

    def take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._raw):
            raise MalformedMessage(f"the form ends after {len(self._raw)} bytes, {self._at} are announced")
        return self._raw[start : self._at]

    def name(self) -> str:
        return self.take(_u32(self.take(4))[0]).decode("utf-8", "surrogatepass")

    def count(self, depth: int) -> int:
        """How many nodes follow; no more than could be there."""
        count = _u32(self.take(4))[0]
        self._nodes += count
        if depth >= MAX_DEPTH:
            raise MalformedMessage(f"nested deeper than {MAX_DEPTH} levels")
        left = len(self._raw) - self._at
        if count > left or self._nodes > MAX_NODES:
            raise MalformedMessage(f"{count} values announced in {left} bytes, {MAX_NODES} at most")
        return count


_Read = Callable[[_FormReader, int], _Build]


def _constant(value: Any) -> _Read:
    def build(values: Decoder) -> Any:
        return value

    return lambda form, depth: build


def _value(code: str, build: _Build) -> _Read:
    """Of a node with one number."""

    def read(form: _FormReader, depth: int) -> _Build:
        form.codes.append(code)
        return build

    return read


def _array(code: str, view: Callable[..., Any]) -> _Read:
    def read(form: _FormReader, depth: int) -> _Build:
        dtype, shape, nbytes = parse_head(form.take(_u16(form.take(2))[0]))
        form.array_bytes += nbytes
        form.codes.append(code)
        return lambda values: view(values, dtype, shape, nbytes)

    return read


def _list(form: _FormReader, depth: int) -> _Build:
    children = [form.node(depth + 1) for _ in range(form.count(depth))]
    return lambda values: [child(values) for child in children]


def _tuple(form: _FormReader, depth: int) -> _Build:
    build = _list(form, depth)
    return lambda values: tuple(build(values))


def _dict(form: _FormReader, depth: int) -> _Build:
    children = [(form.name(), form.node(depth + 1)) for _ in range(form.count(depth))]
    if len(dict(children)) != len(children):
        raise MalformedMessage("a name occurs twice in one dict")
    return lambda values: {name: child(values) for name, child in children}


def _dataclass(form: _FormReader, depth: int) -> _Build:
    name, build = form.name(), _dict(form, depth)
    return lambda values: _make(name, build(values))


_READERS: dict[bytes, _Read] = {
    b"N": _constant(None),
    b"T": _constant(True),
    b"F": _constant(False),
    b"i": _value("q", lambda values: values.number()),
    b"f": _value("d", lambda values: values.number()),
    b"I": _value("Q", lambda values: _long_int(values.raw())),
    b"s": _value("Q", lambda values: values.raw().decode("utf-8", "surrogatepass")),
    b"b": _value("Q", Decoder.raw),
    b"l": _list,
    b"t": _tuple,
    b"d": _dict,
    b"D": _dataclass,
    b"a": _array("", Decoder.inline_array),
    b"m": _array("Q", Decoder.shared_array),
    b"g": _array("", lambda *place: Decoder.inline_array(*place).copy()[()]),
}


def _long_int(raw: bytes) -> int:
    if len(raw) > MAX_INT_BYTES:
        raise MalformedMessage(f"an int of {len(raw)} bytes; at most {MAX_INT_BYTES} travel")
    return int.from_bytes(raw, "little", signed=True)


def _make(name: str, values: dict[str, Any]) -> Any:
    """A marked dataclass."""
    cls = travelling_class(name)
    if cls is None:
        raise MalformedMessage(f"a dataclass {name!r}, which is not marked with dive_into here")
    wanted = init_fields(cls)
    if set(values) != set(wanted):
        raise MalformedMessage(f"{name} has the fields {', '.join(wanted)}; got {', '.join(values)}")
    try:
        return cls(**values)
    except Exception as error:
        raise MalformedMessage(f"{name} refuses its fields: {type(error).__name__}: {error}") from error
