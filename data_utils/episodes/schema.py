"""What an episode file fixes beyond its keys: version, attribute names, tolerances, checksums.

Schema version 2 adds checksums (CRC-32, as in zlib), so that no damage to a file goes unnoticed: the attribute
``checksums`` lists every array with that of its bytes, ``<camera>/rgb_crc32`` and ``<camera>/mask_crc32`` hold one
number per frame, and the attribute ``attributes_crc32`` covers all the others. Files of version 1, and files without a
version, have none of these and are read as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import numpy as np

SCHEMA_VERSION = 2
VERSION_ATTR = "schema_version"
# A JPEG's own channel order. "rgb": an ordinary JPEG, right colours in any viewer. "bgr": RGB arrays went through
# OpenCV's encoder unswapped, so red and blue are exchanged inside the file; files without the attribute are such.
JPEG_CHANNELS_ATTR = "jpeg_channels"
VIDEO_ROOT_ATTR = "video_root"
CHECKSUMS_ATTR = "checksums"
ATTRIBUTES_CHECKSUM_ATTR = "attributes_crc32"
REMARKS_ATTR = "conversion_remarks"  # lines of "rule: what is unusual"
FRAME_CHECKSUMS = "{key}_crc32"  # dataset beside one that is read frame by frame

ROTATION_TOLERANCE = 1e-3
OPENNESS_TOLERANCE = 0.05


def array_checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order; of texts, of their UTF-8 joined by zero bytes."""
    if array.dtype.kind in "OU":
        return zlib.crc32(b"\0".join(_encoded(text) for text in array.reshape(-1).tolist()))
    return zlib.crc32(np.ascontiguousarray(array).data if array.size else b"")


def frame_checksums(frames: Iterable[np.ndarray]) -> np.ndarray:
    """(T,) uint32, one checksum per frame."""
    return np.array([array_checksum(np.asarray(frame)) for frame in frames], np.uint32)


def format_checksums(checksums: Mapping[str, int | None]) -> str:
    """The ``checksums`` attribute: a line per key; None for keys that are checked frame by frame."""
    lines = (f"{key} {'-' if value is None else f'{value:08x}'}" for key, value in sorted(checksums.items()))
    return "\n".join(lines)


def parse_checksums(text: str) -> dict[str, int | None]:
    """Inverse of :func:`format_checksums`."""
    pairs = (line.rsplit(" ", 1) for line in text.split("\n"))
    return {key: None if value == "-" else int(value, 16) for key, value in pairs}


def attributes_checksum(attributes: Mapping) -> int:
    """CRC-32 of a file's attributes, in the order of their names, without this checksum itself."""
    checksum = 0
    for name in sorted(set(attributes) - {ATTRIBUTES_CHECKSUM_ATTR}):
        values = np.atleast_1d(attributes[name]).tolist()
        checksum = zlib.crc32(b"\0".join([name.encode(), *(_encoded(value) for value in values)]) + b"\1", checksum)
    return checksum


def _encoded(value) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")


def pose_fault(poses: np.ndarray) -> tuple[int, str, str] | None:
    """Index, rule and description of the first of (N, 4, 4) that is not a rigid transform, or None."""
    finite = np.isfinite(poses).all((-2, -1))
    if not finite.all():
        return int(np.argmin(finite)), "pose", "is not finite"
    rotation = poses[:, :3, :3]
    error = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max((-2, -1))
    good = (error <= ROTATION_TOLERANCE) & (np.linalg.det(rotation) > 0)
    good &= (np.abs(poses[:, 3] - (0.0, 0.0, 0.0, 1.0)) <= ROTATION_TOLERANCE).all(-1)
    if not good.all():
        return int(np.argmin(good)), "rotation", "is not a rigid transform (its rotation part is not a rotation)"
    return None


def openness_fault(gripper: np.ndarray, tolerance: float = OPENNESS_TOLERANCE) -> tuple[int, str] | None:
    """Index and description of the first row of (N, Nee) that is no openness, or None."""
    good = ((gripper >= -tolerance) & (gripper <= 1 + tolerance)).all(-1)
    if good.all():
        return None
    index = int(np.argmin(good))
    return index, f"is {gripper[index].tolist()}; wanted openness in [0 closed, 1 open]"
