"""msgpack with numpy arrays, as openpi's clients and servers speak it, for messages from anybody.

An array is a map with bytes keys: ``__ndarray__`` (true), ``data`` (its bytes in C order), ``dtype`` (``<f4``) and
``shape``; a numpy scalar one of ``__npgeneric__``, ``data`` and ``dtype``. The usual decoder builds whatever dtype a
message names over its bytes, objects included, which kills the process. This one builds numbers, truth values and texts
of checked sizes, and holds every message against limits before it makes anything of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

MOST_VALUES, DEEPEST, MOST_AXES = 10_000, 12, 8
_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248]|U[1-9]\d{0,3})")
_ARRAY, _SCALAR, _DATA, _TYPE, _SHAPE = b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"


class MessageError(ValueError):
    """Bytes that are no message, or one past the limits; says which."""


def pack(value: Any) -> bytes:
    """Raises ``TypeError`` or ``ValueError`` for what cannot travel."""
    return msgpack.packb(value, default=_packed)


def _packed(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        if not _DTYPE.fullmatch(value.dtype.str):
            raise ValueError(f"numpy's {value.dtype} does not travel; wanted numbers, truth values or texts")
        if isinstance(value, np.generic):
            return {_SCALAR: True, _DATA: value.item(), _TYPE: value.dtype.str}
        return {_ARRAY: True, _DATA: value.tobytes(), _TYPE: value.dtype.str, _SHAPE: value.shape}
    raise TypeError(f"a {type(value).__name__} does not travel")


def unpack(message: bytes) -> Any:
    """What a message holds; arrays are read-only views of it. Raises :class:`MessageError`."""
    reader = _Reader(message)
    value = reader.value(DEEPEST)
    if reader.position != len(message):
        raise MessageError(f"the message goes on after its value, for {len(message) - reader.position} bytes")
    return value


class _Reader:
    """One message, value by value, so that nothing is made before it is counted."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        size = len(message)
        self._unpacker = msgpack.Unpacker(max_buffer_size=max(1, size), raw=False)
        self._unpacker.feed(message)
        self._left = MOST_VALUES

    @property
    def position(self) -> int:
        return self._unpacker.tell()

    def value(self, deeper: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise MessageError(f"the message holds more than {MOST_VALUES} values")
        try:
            return self._value(deeper)
        except MessageError:
            raise
        except (ValueError, TypeError, UnicodeDecodeError, msgpack.exceptions.UnpackException) as error:
            raise MessageError(f"the message is no msgpack ({type(error).__name__}: {error})") from error

    def _value(self, deeper: int) -> Any:
        if self.position >= len(self._message):
            raise MessageError("the message ends in the middle of a value")
        kind = self._message[self.position]
        is_map = kind >> 4 == 0x8 or kind in (0xDE, 0xDF)
        if not is_map and kind >> 4 != 0x9 and kind not in (0xDC, 0xDD):
            if kind in (0xC7, 0xC8, 0xC9) or 0xD4 <= kind <= 0xD8:
                raise MessageError("the message holds an extension type; wanted plain msgpack and numpy arrays")
            return self._unpacker.unpack()
        if deeper <= 0:
            raise MessageError(f"the message is nested deeper than {DEEPEST} levels")
        if is_map:
            return self._map(self._unpacker.read_map_header(), deeper - 1)
        return [self.value(deeper - 1) for _ in range(self._unpacker.read_array_header())]

    def _map(self, count: int, deeper: int) -> Any:
        found: dict[str | bytes, Any] = {}
        for _ in range(count):
            key = self.value(0)  # 0: a key is neither map nor list
            if not isinstance(key, (str, bytes)):
                raise MessageError(f"a map has the key {key!r}; wanted texts")
            if key in found:
                raise MessageError(f"a map has the key {key!r} twice")
            found[key] = self.value(deeper)
        if _ARRAY in found:
            return _array(found)
        if _SCALAR in found:
            return _scalar(found)
        return found


def _array(found: Mapping[str | bytes, Any]) -> np.ndarray:
    if set(found) != {_ARRAY, _DATA, _TYPE, _SHAPE}:
        raise MessageError(f"an array comes with {sorted(map(str, found))}; wanted its data, dtype and shape")
    dtype, data, shape = _dtype(found[_TYPE]), found[_DATA], found[_SHAPE]
    if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > MOST_AXES:
        raise MessageError(f"an array's data is a {type(data).__name__} and its shape {shape!r}")
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape):
        raise MessageError(f"an array has the shape {shape!r}; wanted sizes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise MessageError(f"an array of shape {shape} and dtype {dtype.str} comes with {len(data)} bytes")
    if not data:
        return np.zeros(shape, dtype)
    if dtype.kind == "b":
        return (np.frombuffer(data, np.uint8) != 0).reshape(shape)
    return np.frombuffer(data, dtype).reshape(shape)


def _scalar(found: Mapping[str | bytes, Any]) -> np.generic:
    if set(found) != {_SCALAR, _DATA, _TYPE}:
        raise MessageError(f"a numpy number comes with {sorted(map(str, found))}; wanted its data and dtype")
    dtype, data = _dtype(found[_TYPE]), found[_DATA]
    if not isinstance(data, str if dtype.kind == "U" else (bool, int, float)):
        raise MessageError(f"a numpy number of dtype {dtype.str} is given as {type(data).__name__}")
    try:
        return dtype.type(data)
    except (OverflowError, ValueError) as error:
        raise MessageError(f"a numpy number of dtype {dtype.str} is given as {data!r} ({error})") from error


def _dtype(text: Any) -> np.dtype:
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise MessageError(f"an array has the dtype {text!r}; wanted numbers, truth values or texts, such as '<f4'")
    try:
        return np.dtype(text)
    except TypeError as error:
        raise MessageError(f"an array has the dtype {text!r}, which there is not") from error
