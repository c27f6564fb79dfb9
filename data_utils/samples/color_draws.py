"""What ``augment.py`` drew for the colours of a sample, as arrays that a batch can hold."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from data_utils.samples.augment import BLUR_SIGMA_RANGE, MAX_PATCHES, ImageAugmentation
from data_utils.types import ColorDraws

MAX_BLUR_TAPS = round(BLUR_SIGMA_RANGE[1] * 6 + 1) | 1  # OpenCV's rule for uint8


def no_draws(num_cameras: int) -> ColorDraws:
    """Draws that change nothing, of images that show nothing."""
    blur = np.zeros((num_cameras, MAX_BLUR_TAPS), np.float32)
    blur[:, MAX_BLUR_TAPS // 2] = 1
    return ColorDraws(
        window=np.zeros((num_cameras, 4), np.int64),
        lookup=np.tile(np.arange(256, dtype=np.uint8), (num_cameras, 3, 1)),
        mix=np.tile(np.eye(3, dtype=np.float32), (num_cameras, 1, 1)),
        blur=blur,
        patches=np.zeros((num_cameras, MAX_PATCHES, 4), np.int64),
        patch_colors=np.zeros((num_cameras, MAX_PATCHES, 3), np.uint8),
    )


def pack_draws(augmentations: Sequence[ImageAugmentation], windows: Sequence[tuple[int, int, int, int]]) -> ColorDraws:
    """The draws of one sample's cameras as arrays; ``windows`` are (top, left, height, width) in the letterbox."""
    draws = no_draws(len(augmentations))
    for camera, (augmentation, window) in enumerate(zip(augmentations, windows, strict=True)):
        draws.window[camera] = window
        lookup = augmentation.lookup
        if lookup is not None:
            draws.lookup[camera] = lookup.T
        if augmentation.color is not None:
            draws.mix[camera] = augmentation.color
        if augmentation.blur_sigma is not None:
            taps = round(augmentation.blur_sigma * 6 + 1) | 1
            side = (MAX_BLUR_TAPS - taps) // 2
            draws.blur[camera] = 0
            draws.blur[camera, side : side + taps] = cv2.getGaussianKernel(taps, augmentation.blur_sigma)[:, 0]
        for number, patch in enumerate(augmentation.patches):
            top, left, height, width = patch.window(window[2:])
            draws.patches[camera, number] = (window[0] + top, window[1] + left, height, width)
            draws.patch_colors[camera, number] = patch.color
    return draws
