"""An array's dtype and shape as they travel, and back.

u16 and numpy's type string ("<f4") or, if structured, the literal that .npy files use; u8 and as many u64, the shape;
u64, the bytes. The frames of a robot have the same few heads every time, so both directions remember them.
"""

from __future__ import annotations

import ast
import math
import re
import struct
from functools import lru_cache

import numpy as np

from .errors import MalformedMessage, Unsendable

_MAX_DTYPE_BYTES = 4096
_MAX_DIMENSIONS = 32
_MAX_LENGTH = 1 << 40
_SIMPLE_DTYPE = re.compile(r"[<>|=](?:[biufcSUV]\d{1,9}|[mM]8(?:\[\d{0,9}[a-zA-Z]{1,2}\])?)\Z")

_u16 = struct.Struct("<H").unpack_from


@lru_cache(maxsize=1024)
def array_head(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """An array's dtype and shape as they travel."""
    name = _dtype_name(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    head = name + struct.pack(f"<B{len(shape) + 1}Q", len(shape), *shape, nbytes)
    return struct.pack("<H", len(head)) + head


@lru_cache(maxsize=1024)
def parse_head(head: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """dtype, shape and bytes of an array, which agree with one another."""
    end = 2 + _u16(head, 0)[0]
    dtype = _parse_dtype(head[2:end])
    ndim = head[end]
    if ndim > _MAX_DIMENSIONS:
        raise MalformedMessage(f"an array of {ndim} dimensions; at most {_MAX_DIMENSIONS} travel")
    *shape, nbytes = struct.unpack(f"<{ndim + 1}Q", head[end + 1 :])
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise MalformedMessage(f"{dtype} of shape {tuple(shape)} does not take the {nbytes} bytes of its header")
    if max(shape, default=0) > _MAX_LENGTH:
        raise MalformedMessage(f"an array of shape {tuple(shape)}")
    return dtype, tuple(shape), nbytes


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
