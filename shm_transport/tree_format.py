"""Trees of plain values and numpy arrays, as bytes.

A tree is None, bool, int, float, str, bytes, list, tuple, dict with str keys, numpy arrays and scalars, dataclasses
marked by ``dive_into``, and torch tensors, which go as arrays.

Its message is a form and what fills it. The form says what the tree looks like, and is the same for every frame of a
robot, so that a decoder remembers what it has made of it::

    u32 and the form
    numbers, 8 bytes each; zeros up to a multiple of 16
    raw bytes of texts, of longer ints and of inline arrays, which begin at multiples of 16

A byte of the form says what a node is; all three parts are in the order of the nodes, and little-endian::

    N T F            None, True, False
    i f              int of 64 bits, float                               a number: i64, f64
    I s b            longer int (two's complement), str (UTF-8), bytes   a number: u64, its bytes in raw
    l t  u32 nodes   list, tuple
    d u32 (u32 key, node)...             dict
    D u32 name u32 (u32 field, node)...  dataclass
    a u16 head       array in raw
    m u16 head       array in the writer's shared segment                a number: u64, its offset there
    g u16 head       numpy scalar, as an array in raw (numpy's str and bytes go as Python's)

The head of an array is described in ``array_head``.
Arrays of Python objects are refused either way, nothing here is pickled, and a decoder believes no number before it has
compared it with the bytes it has.
"""

#: arrays of at least so many bytes go through shared memory where there is one
SHARED_FROM = 8192
MAX_DEPTH = 32
MAX_NODES = 1 << 20
MAX_INT_BYTES = 1024
INLINE_ALIGNMENT = 16
SHARED_ALIGNMENT = 64  # a cache line
