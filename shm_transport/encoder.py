"""Trees to bytes, as ``tree_format`` describes them."""

from __future__ import annotations

import struct
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from .array_head import array_head
from .errors import Unsendable
from .marks import init_fields, travelling_class
from .tree_format import INLINE_ALIGNMENT, MAX_DEPTH, MAX_INT_BYTES, MAX_NODES, SHARED_ALIGNMENT, SHARED_FROM

_REMEMBERED_NAME = 64  # bytes: the keys of frames recur, and others must not fill the memory
_OWN_PART_FROM = 1 << 16  # an inline array of so many bytes is sent from where it lies

_pack_node = struct.Struct("<cI").pack
_pack_u32, _pack_u64, _pack_i64, _pack_f64 = (struct.Struct("<" + code).pack for code in "IQqd")


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
        self._form = bytearray()
        self._numbers = bytearray()
        self._raw = bytearray()
        self._parts: list[Any] = []  # of raw, those before
        self._finished = 0  # bytes in them
        self._nodes = 0

    def encode(self, tree: Any) -> list[Any]:
        """The message as parts to send one after another (bytes-like).

        Raises Unsendable (a TypeError) for a value that cannot travel, ValueError beyond the limits."""
        self._node(tree, 0)
        head = _pack_u32(len(self._form)) + self._form + self._numbers
        return [head + bytes(-len(head) % INLINE_ALIGNMENT), *self._parts, self._raw]

    def _node(self, x: Any, depth: int) -> None:
        _WRITERS.get(type(x), Encoder._other)(self, x, depth)

    def _none(self, x: None, depth: int) -> None:
        self._form += b"N"

    def _bool(self, x: bool, depth: int) -> None:
        self._form += b"T" if x else b"F"

    def _float(self, x: float, depth: int) -> None:
        self._form += b"f"
        self._numbers += _pack_f64(x)

    def _int(self, x: int, depth: int) -> None:
        if -(1 << 63) <= x < 1 << 63:
            self._form += b"i"
            self._numbers += _pack_i64(x)
            return
        raw = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
        if len(raw) > MAX_INT_BYTES:
            raise ValueError(f"an int of {len(raw)} bytes; at most {MAX_INT_BYTES} travel")
        self._text(b"I", raw)

    def _str(self, x: str, depth: int) -> None:
        self._text(b"s", x.encode("utf-8", "surrogatepass"))

    def _bytes(self, x: bytes, depth: int) -> None:
        self._text(b"b", x)

    def _text(self, tag: bytes, raw: bytes) -> None:
        self._form += tag
        self._numbers += _pack_u64(len(raw))
        self._raw += raw

    def _list(self, x: list, depth: int) -> None:
        self._sequence(x, b"l", depth)

    def _tuple(self, x: tuple, depth: int) -> None:
        self._sequence(x, b"t", depth)

    def _dict(self, x: dict, depth: int) -> None:
        self._form += _pack_node(b"d", len(x))
        self._named(x.items(), depth, dict)

    def _other(self, x: Any, depth: int) -> None:
        """What ``_WRITERS`` does not list."""
        kind = type(x)
        torch = sys.modules.get("torch")  # whoever has a tensor has imported it
        if isinstance(x, (np.str_, np.bytes_)):
            self._node(x.item(), depth)
        elif isinstance(x, np.generic):
            self._array(np.asarray(x), depth, b"g")
        elif kind is np.memmap:
            self._array(x.view(np.ndarray), depth)
        elif torch is not None and isinstance(x, torch.Tensor):
            try:
                array = x.detach().cpu().resolve_conj().resolve_neg().numpy()
            except (TypeError, RuntimeError) as error:
                raise Unsendable(f"a tensor of {x.dtype}, {x.layout} has no numpy form ({error}); convert it") from None
            self._array(array, depth)
        elif travelling_class(kind.__name__) is kind:
            names = init_fields(kind)
            self._form += b"D" + _name(kind.__name__) + _pack_u32(len(names))
            self._named([(name, getattr(x, name)) for name in names], depth, kind)
        else:
            raise Unsendable(
                f"a {kind.__module__}.{kind.__qualname__} cannot travel; send numbers, strings, bytes, lists, tuples, "
                "dicts, numpy arrays, or a dataclass marked with dive_into"
            )

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
                self._form += _name(name)
                self._node(value, depth + 1)
        except Unsendable as error:
            error.path.append(f"[{name!r}]" if kind is dict else f".{name}")
            raise

    def _sequence(self, values: Any, tag: bytes, depth: int) -> None:
        self._enter(len(values), depth)
        self._form += _pack_node(tag, len(values))
        index = 0
        try:
            for index, value in enumerate(values):  # noqa: B007 (used where it fails)
                self._node(value, depth + 1)
        except Unsendable as error:
            error.path.append(f"[{index}]")
            raise

    def _array(self, array: np.ndarray, depth: int, tag: bytes = b"a") -> None:
        nbytes = array.nbytes
        head = array_head(array.dtype, array.shape)
        if nbytes >= SHARED_FROM and self._arena is not None and tag == b"a":
            self._form += b"m" + head
            self._numbers += _pack_u64(self._arena.place(array))
            return
        self._form += tag + head
        raw = self._raw
        raw += bytes(-(self._finished + len(raw)) % INLINE_ALIGNMENT)
        if nbytes < _OWN_PART_FROM:
            raw += array.tobytes()
            return
        if not array.flags.c_contiguous:
            array = array.copy(order="C")
        self._parts += [raw, array.reshape(-1).view(np.uint8).data]
        self._finished += len(raw) + nbytes
        self._raw = bytearray()


_WRITERS = {
    np.ndarray: Encoder._array,
    dict: Encoder._dict,
    str: Encoder._str,
    float: Encoder._float,
    int: Encoder._int,
    bool: Encoder._bool,
    type(None): Encoder._none,
    list: Encoder._list,
    tuple: Encoder._tuple,
    bytes: Encoder._bytes,
}


def _name(name: str) -> bytes:
    """A key, or a field's name, as it travels: u32 and text."""
    return _remembered_name(name) if len(name) <= _REMEMBERED_NAME else _packed_name(name)


def _packed_name(name: str) -> bytes:
    raw = name.encode("utf-8", "surrogatepass")
    return _pack_u32(len(raw)) + raw


@lru_cache(maxsize=1024)
def _remembered_name(name: str) -> bytes:
    return _packed_name(name)
