"""Fit an image into the policy's size with black borders, and keep its intrinsics true."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Letterbox:
    """How an image of ``in_hw`` sits in one of ``out_hw``: resized to ``size``, placed at ``offset`` (both y, x)."""

    in_hw: tuple[int, int]
    out_hw: tuple[int, int]
    size: tuple[int, int]
    offset: tuple[int, int]

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the output that show the image."""
        (oy, ox), (h, w) = self.offset, self.size
        return slice(oy, oy + h), slice(ox, ox + w)

    def resize(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) uint8 to (h, w, C): area filter when shrinking, linear when growing; the input if sizes agree."""
        if self.size == self.in_hw:
            return image
        shrinks = self.size[0] < self.in_hw[0] or self.size[1] < self.in_hw[1]
        return cv2.resize(image, self.size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

    def image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 to (H', W', 3), black outside the window."""
        out = np.zeros((*self.out_hw, image.shape[2]), image.dtype)
        out[self.window] = self.resize(image)
        return out

    def mask(self, mask: np.ndarray | None = None) -> np.ndarray:
        """(H, W) bool valid pixels, or None for all of them, to (H', W') bool, False outside the window."""
        out = np.zeros(self.out_hw, bool)
        if mask is None:
            out[self.window] = True
        else:
            resized = cv2.resize(mask.astype(np.uint8), self.size[::-1], interpolation=cv2.INTER_NEAREST)
            out[self.window] = resized.astype(bool)
        return out

    def intrinsics(self, K: np.ndarray) -> np.ndarray:
        """(..., 3, 3) at the input's size to (..., 3, 3) float64 at the output's."""
        scale_y, scale_x = self.size[0] / self.in_hw[0], self.size[1] / self.in_hw[1]
        affine = np.array([[scale_x, 0.0, self.offset[1]], [0.0, scale_y, self.offset[0]], [0.0, 0.0, 1.0]])
        return affine @ np.asarray(K, np.float64)


@functools.lru_cache(maxsize=1024)
def fit(in_hw: tuple[int, int], out_hw: tuple[int, int]) -> Letterbox:
    """The letterbox that takes an image of ``in_hw`` (height, width) into ``out_hw`` without distortion.

    Raises:
        ValueError: the image is so thin that nothing of it would be left.
    """
    scale = min(out_hw[0] / in_hw[0], out_hw[1] / in_hw[1])
    h, w = int(scale * in_hw[0]), int(scale * in_hw[1])
    if h < 1 or w < 1:
        raise ValueError(f"an image of {in_hw} (height, width) does not fit into {out_hw}: one side would vanish")
    return Letterbox(in_hw, out_hw, (h, w), ((out_hw[0] - h) // 2, (out_hw[1] - w) // 2))


def norm_xy(K: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Normalised camera-plane coordinates of every pixel: (..., 3, 3) to (..., 2, H, W) float32, x then y."""
    K = np.asarray(K, np.float64)
    x = (np.arange(hw[1]) - K[..., 0, 2, None]) / K[..., 0, 0, None]  # (..., W)
    y = (np.arange(hw[0]) - K[..., 1, 2, None]) / K[..., 1, 1, None]  # (..., H)
    out = np.empty((*K.shape[:-2], 2, *hw), np.float32)
    out[..., 0, :, :] = x[..., None, :]
    out[..., 1, :, :] = y[..., :, None]
    return out
