"""Decoding stored frames: JPEGs and raw arrays to RGB images."""

from __future__ import annotations

from typing import Protocol

import cv2
import numpy as np

from data_utils.words import one_line


class FrameError(Exception):
    """What is wrong with a frame; the caller adds file and key."""


class FrameDecoder(Protocol):
    def decode(self, data: np.ndarray) -> np.ndarray:
        """One stored frame to (H, W, 3) uint8 RGB. Raises :class:`FrameError`."""


class JpegDecoder:
    """(n,) uint8, the bytes of a JPEG; all frames of a camera have one size.

    Args:
        swapped: red and blue are exchanged inside the JPEG (see ``schema.JPEG_CHANNELS_ATTR``).
    """

    def __init__(self, swapped: bool) -> None:
        # A swapped JPEG's BGR is RGB.
        self._flags = (cv2.IMREAD_COLOR_BGR if swapped else cv2.IMREAD_COLOR_RGB) | cv2.IMREAD_IGNORE_ORIENTATION
        self._shape: tuple[int, ...] | None = None

    def decode(self, data: np.ndarray) -> np.ndarray:
        # libjpeg fills in what a cut file lacks with grey, so the end marker is checked here.
        whole = data.size >= 4 and data[0] == 0xFF and data[1] == 0xD8
        if not whole or not data[-64:].tobytes().rstrip(b"\0").endswith(b"\xff\xd9"):
            raise FrameError(f"is not a whole JPEG ({data.size} bytes); record the episode again")
        try:
            image = cv2.imdecode(data, self._flags)
        except cv2.error as error:
            raise FrameError(f"is not a decodable JPEG ({one_line(error, 120)})") from error
        if image is None:
            raise FrameError("is not a decodable JPEG; record the episode again")
        self._shape = self._shape or image.shape
        if image.shape != self._shape:
            raise FrameError(f"is {image.shape[:2]}, other frames are {self._shape[:2]}")
        return image


def jpeg_size(data: np.ndarray) -> tuple[int, int]:
    """Height and width of a JPEG's (n,) bytes. Raises :class:`FrameError`."""
    return JpegDecoder(False).decode(data).shape[:2]


class RawDecoder:
    """(3, H, W) uint8.

    Args:
        is_bgr: channels are blue, green, red.
    """

    def __init__(self, is_bgr: bool) -> None:
        self._is_bgr = is_bgr

    def decode(self, data: np.ndarray) -> np.ndarray:
        image = np.ascontiguousarray(data.transpose(1, 2, 0))
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if self._is_bgr else image
