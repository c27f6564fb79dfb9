"""Trees as bytes: everything comes back as it was, and nothing that is not a tree comes back at all."""

from __future__ import annotations

import dataclasses
import pickle
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shm_transport import MalformedMessage, dive_into
from shm_transport.decoder import Decoder
from shm_transport.encoder import Arena, Encoder
from shm_transport.tree_format import MAX_DEPTH, SHARED_FROM


@dive_into
@dataclasses.dataclass
class Waypoint:
    """A dataclass that travels."""

    position: np.ndarray
    label: str = ""


class Canary:
    """Its pickle calls a function when it is read."""

    executed = False

    def __reduce__(self):
        return (setattr, (Canary, "executed", True))


def encode(tree, shared: bool = False) -> tuple[bytes, bytes]:
    """The message and what would be in the segment."""
    arena = Arena() if shared else None
    message = b"".join(bytes(part) for part in Encoder(arena).encode(tree))
    segment = bytearray(arena.size if arena else 0)
    if arena:
        arena.fill(segment)
    return message, bytes(segment)


def through(tree, shared: bool = False, copy: bool = False):
    message, segment = encode(tree, shared)
    return Decoder(message, segment, len(segment), copy).decode()


def assert_same(got, sent) -> None:
    assert type(got) is type(sent), (got, sent)
    if isinstance(sent, np.ndarray):
        assert got.dtype == sent.dtype and got.shape == sent.shape
        assert got.tobytes() == sent.tobytes()  # NaNs too
    elif isinstance(sent, np.generic):
        assert got.dtype == sent.dtype and got.tobytes() == sent.tobytes()
    elif isinstance(sent, dict):
        assert list(got) == list(sent)
        for key, value in sent.items():
            assert_same(got[key], value)
    elif isinstance(sent, (list, tuple)):
        assert len(got) == len(sent)
        for one, other in zip(got, sent, strict=True):
            assert_same(one, other)
    elif isinstance(sent, float):
        assert struct.pack("d", got) == struct.pack("d", sent)
    else:
        assert got == sent


dtypes = st.one_of(
    hnp.scalar_dtypes(), hnp.byte_string_dtypes(), hnp.unicode_string_dtypes(), hnp.array_dtypes(max_size=3)
)
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
strided = arrays.map(lambda a: a[(*(slice(None, None, -2) for _ in a.shape), ...)])
# numpy's own str and bytes come back as Python's
scalars = hnp.arrays(hnp.scalar_dtypes().filter(lambda dtype: dtype.kind not in "SU"), ()).map(lambda a: a[()])
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 2000), 1 << 2000)
    | st.floats(width=64)
    | st.text(st.characters())
    | st.binary()
    | arrays
    | strided
    | scalars
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(trees, st.booleans(), st.booleans())
def test_any_tree_comes_back_as_it_was(tree, shared, copy):
    assert_same(through(tree, shared, copy), tree)


@pytest.mark.parametrize(
    "dtype", ["?", "i1", ">i2", "<u8", "f2", ">f4", "g", "c16", "S3", "U2", "M8[us]", "m8[3D]", "V5"]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (64, 65)])
@pytest.mark.parametrize("shared", [False, True])
def test_every_kind_of_array_travels_inline_and_shared(dtype, shape, shared):
    raw = np.random.default_rng(0).integers(0, 2, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    array = np.ascontiguousarray(raw).view(np.uint8).tobytes()
    array = np.frombuffer(array, dtype).reshape(shape) if array else np.empty(shape, dtype)
    assert_same(through(array, shared), array)
    if len(shape) == 2:
        assert_same(through(array.T[::2], shared, copy=True), array.T[::2])


def test_structured_arrays_travel_with_their_fields():
    points = np.zeros(3, [("xyz", "<f4", (3,)), ("seen", [("by", "S4"), ("at", ">f8")])])
    points["seen"]["at"] = 0.5
    assert_same(through(points), points)
    assert_same(through(np.zeros(2, np.dtype("u1,f8", align=True))), np.zeros(2, np.dtype("u1,f8", align=True)))


def test_large_arrays_lie_in_the_segment_and_small_ones_in_the_message():
    message, segment = encode([np.zeros(SHARED_FROM, np.uint8), np.zeros(SHARED_FROM - 1, np.uint8)], shared=True)
    assert len(segment) == SHARED_FROM and SHARED_FROM - 1 < len(message) < SHARED_FROM + 200


def test_arrays_are_read_only_views_or_the_callers_own():
    message, segment = encode([np.zeros(9), np.zeros(SHARED_FROM), np.zeros((0, 3))], shared=True)
    for array in Decoder(message, segment, len(segment)).decode():
        assert not array.flags.writeable
    for array in Decoder(message, segment, len(segment), copy=True).decode():
        assert array.flags.writeable and array.flags.owndata
    assert all(array.flags.aligned for array in Decoder(message, segment, len(segment)).decode())


def test_messages_of_one_form_have_values_of_their_own():
    def tree(number: int) -> dict:
        return {"image": np.full((2, 2), number), "label": "x" * number, "t": number / 3, "n": number, "way": [number]}

    messages = [encode(tree(number)) for number in range(5)]
    assert len({message[: 4 + struct.unpack_from("<I", message)[0]] for message, _ in messages}) == 1
    for number, (message, _) in enumerate(messages):
        assert_same(Decoder(message).decode(), tree(number))


def test_marked_dataclasses_arrive_as_such_and_others_are_refused():
    got = through([Waypoint(np.arange(3.0), "grasp")])[0]
    assert type(got) is Waypoint and got.label == "grasp" and (got.position == np.arange(3.0)).all()

    @dataclasses.dataclass
    class Unmarked:
        label: str = ""

    with pytest.raises(TypeError, match="Unmarked cannot travel"):
        encode(Unmarked())
    message, _ = encode(Waypoint(np.zeros(1)))
    with pytest.raises(MalformedMessage, match="'Waypoinx', which is not marked"):
        Decoder(message.replace(b"Waypoint", b"Waypoinx")).decode()
    with pytest.raises(MalformedMessage, match="has the fields position, label; got position, lab_l"):
        Decoder(message.replace(b"label", b"lab_l")).decode()


@pytest.mark.parametrize(
    "value, reason",
    [
        ({1: 2}, "the key 1 is not a str"),
        (object(), "builtins.object cannot travel"),
        ({"a": [0, {1}]}, r"\['a'\]\[1\]: a builtins.set"),
        (np.array([None]), "Python objects"),
        (np.zeros(1, [("x", object)]), "Python objects"),
        (np.zeros(2, "V0"), "no bytes"),
        (np.ma.masked_array([1, 2], [True, False]), "MaskedArray cannot travel"),
    ],
)
def test_what_cannot_travel_is_refused_by_its_place(value, reason):
    with pytest.raises(TypeError, match=reason):
        encode(value)


def test_limits_hold_on_both_sides():
    deep: list = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ValueError, match="nested deeper"):
        encode(deep)
    with pytest.raises(MalformedMessage, match="nested deeper"):
        Decoder(message_of(b"l\x01\x00\x00\x00" * 40 + b"N")).decode()
    with pytest.raises(ValueError, match="send long lists as arrays"):
        encode([0] * (1 << 21))
    with pytest.raises(MalformedMessage, match="values announced"):
        Decoder(message_of(b"l" + struct.pack("<I", 1 << 20) + b"N")).decode()
    with pytest.raises(ValueError, match="an int of"):
        encode(1 << 10_000)
    node, segment = array_node(b"|u1", (SHARED_FROM,), SHARED_FROM, b"m"), bytes(SHARED_FROM)
    twice = message_of(b"l\x02\x00\x00\x00" + 2 * node, struct.pack("<2Q", 0, 0))  # the same memory, twice
    assert len(Decoder(twice, segment, len(segment)).decode()) == 2
    with pytest.raises(MalformedMessage, match="more than the limit"):
        Decoder(twice, segment, len(segment), max_bytes=SHARED_FROM + 1).decode()


def message_of(form: bytes, numbers: bytes = b"", raw: bytes = b"") -> bytes:
    """A message of parts of one's own."""
    head = struct.pack("<I", len(form)) + form + numbers
    return head + bytes(-len(head) % 16) + raw


def array_node(dtype: bytes, shape: tuple[int, ...], nbytes: int, tag: bytes = b"a") -> bytes:
    """An array's node with a head of one's own."""
    head = struct.pack("<H", len(dtype)) + dtype + struct.pack(f"<B{len(shape) + 1}Q", len(shape), *shape, nbytes)
    return tag + struct.pack("<H", len(head)) + head


def array_message(
    dtype: bytes, shape: tuple[int, ...], nbytes: int, data: bytes = b"", offset: int | None = None
) -> bytes:
    if offset is None:
        return message_of(array_node(dtype, shape, nbytes), raw=data)
    return message_of(array_node(dtype, shape, nbytes, b"m"), struct.pack("<Q", offset))


@pytest.mark.parametrize(
    "message, reason",
    [
        (array_message(b"<f4", (4,), 12, bytes(12)), "does not take the 12 bytes"),
        (array_message(b"<f4", (4,), 16, bytes(12)), "16 bytes at"),
        (array_message(b"<f4", (1 << 62, 4), 1 << 66 & 0xFFFF, bytes(12)), "does not take"),
        (array_message(b"<f4", (1 << 40,), 1 << 42), "more than the limit"),
        (array_message(b"<f4", (1 << 60, 0), 0), "array of shape"),
        (array_message(b"|u1", (1,) * 40, 1, b"x"), "40 dimensions"),
        (array_message(b"|O", (1,), 8, bytes(8)), "not a dtype that travels"),
        (array_message(b"O", (1,), 8, bytes(8)), "not a dtype that travels"),
        (array_message(b"f8,O", (1,), 16, bytes(16)), "not a dtype that travels"),
        (array_message(b"[('x', '|O')]", (1,), 8, bytes(8)), "not a dtype that travels"),
        (array_message(b"[('x', [('y', '|O', (2,))])]", (1,), 16, bytes(16)), "not a dtype that travels"),
        (array_message(b"[('x', __import__('os'))]", (1,), 8, bytes(8)), "not a dtype that travels"),
        (array_message(b"[" * 4000, (1,), 8, bytes(8)), "not a dtype that travels"),
        (array_message(b"|V0", (1,), 0), "not a dtype that travels"),
        (array_message(b"<f4", (1024,), 4096, offset=0), "names no segment"),
        (pickle.dumps(Canary()), "a form of"),
        (message_of(pickle.dumps(Canary())), "no kind of value"),
        (b"", "a message of 0 bytes"),
        (message_of(b""), "the form ends after 0 bytes"),
        (message_of(b"NN"), "1 bytes after the end of the form"),
        (message_of(b"N", raw=b"x"), "the tree ends at byte 16 of 17"),
        (message_of(b"f", bytes(4))[:9], "a message of 9 bytes"),
        (message_of(b"s", b"\xff" * 8, b"ab"), "are announced"),
        (message_of(b"s", struct.pack("<Q", 1), b"\xff"), "utf-8"),
        (message_of(b"I", struct.pack("<Q", 2000), bytes(2000)), "an int of 2000 bytes"),
        (message_of(b"d\x02\x00\x00\x00" + b"\x01\x00\x00\x00aN" * 2), "twice"),
        (message_of(b"d\x01\x00\x00\x00\xff\xff\xff\xffaN"), "the form ends after"),
        (message_of(b"\x7f"), "0x7f, which is no kind of value"),
    ],
)
def test_a_message_that_contradicts_itself_is_refused(message, reason):
    with pytest.raises(MalformedMessage, match=reason):
        Decoder(message).decode()
    assert not Canary.executed


@pytest.mark.parametrize("offset, used", [(0, 4095), (64, 4096), (4096, 4096), (1, 8192), (1 << 63, 8192)])
def test_an_array_outside_its_segment_is_refused(offset, used):
    with pytest.raises(MalformedMessage):
        Decoder(array_message(b"<f4", (1024,), 4096, offset=offset), bytes(8192), used).decode()


def test_ten_thousand_broken_messages_are_refused_and_nothing_else_happens():
    """Random bytes, pickles, valid messages with bytes changed, cut out or put in: a tree or MalformedMessage."""
    rng = random.Random(0)
    camera = {
        "K": np.eye(3),
        "color": np.zeros((64, 64, 3), np.uint8),
        "seg": None,
        "name": "wrist",
        "t": 1.5,
        "n": 1 << 70,
    }
    tree = ("add_obs_frame", ({"cam": camera, "way": Waypoint(np.arange(3.0)), "many": [1, 2.5, np.float32(3)]},), {})
    valid, segment = encode(tree, shared=True)
    assert len(segment) > 0
    pickles = [pickle.dumps(Canary(), protocol) for protocol in range(6)]
    refused = 0
    for number in range(10_000):
        kind = number % 4
        if kind == 0:
            message = rng.randbytes(rng.randrange(200))
        elif kind == 1:
            message = rng.choice((b"", b"b", b"a", valid[: rng.randrange(len(valid))])) + rng.choice(pickles)
        else:
            changed = bytearray(valid)
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(len(changed))
                if kind == 2:
                    changed[at] = rng.randrange(256)
                else:
                    changed[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
            message = bytes(changed)
        try:
            Decoder(message, segment, len(segment), copy=True, max_bytes=1 << 20).decode()
        except MalformedMessage:
            refused += 1
    assert refused > 7_000 and not Canary.executed
    assert_same(Decoder(valid, segment, len(segment)).decode()[1][0]["cam"], camera)
