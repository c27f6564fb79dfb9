"""An image and where it was taken from; where points of the world fall in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CameraFrame:
    """One image and where it was taken from."""

    rgb: np.ndarray  # (H, W, 3) uint8
    K: np.ndarray  # (3, 3) at (H, W)
    world_from_cam: np.ndarray  # (4, 4), OpenCV axes
    mask: np.ndarray | None = None  # (H, W) bool valid pixels, None for all


_NEAR = 0.01  # metres in front of the camera, below which a point is not drawn


def project(points: np.ndarray, K: np.ndarray, world_from_cam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (..., 2) of world points (..., 3), and which lie in front of the camera (...,) bool."""
    rotation, origin = world_from_cam[:3, :3], world_from_cam[:3, 3]
    in_cam = (points - origin) @ rotation  # rows times R = R^T applied to columns
    depth = in_cam[..., 2]
    visible = depth > _NEAR
    pixels = (in_cam / np.where(visible, depth, 1.0)[..., None]) @ K.T
    return pixels[..., :2], visible
