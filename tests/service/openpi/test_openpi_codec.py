"""Messages of openpi's protocol: what its own packer writes is read, and nothing else harms or grows the process."""

from __future__ import annotations

import random
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from apt.infer.openpi_codec import DEEPEST, MOST_VALUES, MessageError, pack, unpack
from tests.service.openpi.conftest import as_maps, as_numpy

TYPES = st.one_of(arrays.boolean_dtypes(), arrays.integer_dtypes(), arrays.floating_dtypes(sizes=(32, 64)))
ARRAYS = arrays.arrays(TYPES, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | ARRAYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_what_is_packed_comes_back_and_openpis_own_packing_is_the_same(value):
    message = pack(value)
    assert message == msgpack.packb(value, default=as_maps)
    assert same(unpack(message), value)
    assert same(msgpack.unpackb(message, object_hook=as_numpy), value)


def test_numpys_numbers_texts_and_arrays_in_any_order_travel():
    frame = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    sent = {"n": np.float32(2.5), "flag": np.bool_(True), "names": np.array(["left", "right"]), "turned": frame[::-1].T}
    read = unpack(pack(sent))
    assert read["n"] == np.float32(2.5) and read["n"].dtype == np.float32 and read["flag"]
    assert read["names"].tolist() == ["left", "right"] and np.array_equal(read["turned"], frame[::-1].T)
    for value in (np.array([None]), np.array([1j]), object()):
        with pytest.raises((TypeError, ValueError), match="does not travel"):
            pack(value)


def made_array(**changes) -> bytes:
    keys = {"data": b"1234", "dtype": "<f4", "shape": [1]} | changes
    return msgpack.packb({b"__ndarray__": True, **{key.encode(): value for key, value in keys.items()}})


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (b"", "ends in the middle"),
        (pack({"a": [1, 2]})[:-1], "ends in the middle"),
        (pack(1) + pack(2), "goes on after its value"),
        (b"\x91" * (DEEPEST + 1) + b"\xc0", "nested deeper"),
        (b"\xdd\xff\xff\xff\xff", "ends in the middle"),
        (b"\xdc" + (MOST_VALUES + 1).to_bytes(2, "big") + b"\x90" * (MOST_VALUES + 1), "more than 10000 values"),
        (b"\xc7\x01\x05a", "extension type"),
        (b"\x81\x01\x02", "has the key 1"),
        (b"\x82\xa1a\x01\xa1a\x02", "key 'a' twice"),
        (b"\x81\x90\x01", "nested deeper"),
        (b"\xa2\xff\xfe", "no msgpack"),
        (made_array(dtype="|O", data=b"12345678"), "has the dtype '|O'"),
        (made_array(dtype="<c8", data=b"12345678"), "has the dtype '<c8'"),
        (made_array(dtype="<M8[s]", data=b"12345678"), "has the dtype '<M8"),
        (made_array(dtype=[["a", "<f4"]]), "has the dtype"),
        (made_array(shape=[-1]), "shape .-1"),
        (made_array(shape=[2]), "comes with 4 bytes"),
        (made_array(shape=[1.0]), "shape .1.0"),
        (made_array(shape=[1] * 9), "shape"),
        (made_array(shape=[True]), "shape"),
        (made_array(data="1234"), "data is a str"),
        (made_array(extra=1), "wanted its data, dtype and shape"),
        (made_array(shape=[0, 2**62], data=b""), "no msgpack"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "given as 300"),
        (msgpack.packb({b"__npgeneric__": True, b"data": [1], b"dtype": "|u1"}), "given as list"),
    ],
)
def test_what_is_no_message_is_refused_with_what_it_is(message, says):
    with pytest.raises(MessageError, match=says.replace("|", r"\|")):
        unpack(message)


def test_ten_thousand_mutated_messages_are_read_or_refused_and_leave_nothing_behind():
    image = np.zeros((32, 32, 3), np.uint8)
    observation = {
        "cam": {"data": {"color": image, "wcT": np.eye(4)}},
        "gripper": 0.5,
        "prompt": "go",
        "n": np.int64(3),
    }
    message, rng = pack(observation), random.Random(0)
    readable = 0

    def mutate() -> bytes:
        changed = bytearray(message)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(min(len(changed), 200)) if rng.random() < 0.7 else rng.randrange(len(changed))
            kind = rng.random()
            if kind < 0.7:
                changed[place] = rng.randrange(256)
            elif kind < 0.85:
                del changed[place : place + rng.randint(1, 8)]
            else:
                changed[place:place] = rng.randbytes(rng.randint(1, 8))
        return bytes(changed)

    tracemalloc.start()
    for number in range(10_000):
        try:
            unpack(mutate())
            readable += 1
        except MessageError:
            pass
        if number == 1000:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 100 < readable < 9_900, "some mutations are harmless, most are not"
    assert after - before < 100_000 and peak - before < 4_000_000
