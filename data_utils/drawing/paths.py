"""Paths of grippers drawn into camera images."""

from __future__ import annotations

import cv2
import numpy as np

from data_utils.geometry.camera import project

# Matplotlib-like, RGB: predicted samples first, recorded in green.
PREDICTED = (255, 64, 32)
RECORDED = (40, 220, 60)
_SUBPIXEL_BITS = 4


def enlarge(image: np.ndarray, K: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """An image ``scale`` times as large, and its intrinsics, so that what is drawn is finer than the pixels."""
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC), K * [[scale], [scale], [1]]


def draw_trajectory(
    image: np.ndarray,
    K: np.ndarray,
    world_from_cam: np.ndarray,
    positions: np.ndarray,
    openness: np.ndarray | None = None,
    color: tuple[int, int, int] = PREDICTED,
    thickness: int | None = None,
) -> np.ndarray:
    """Draw one arm's path; a copy is returned.

    The line fades from dark to ``color`` over time. Dots mark the steps: filled where the gripper is open, small and
    white where it is closed.

    Args:
        image: (H, W, 3) uint8 RGB.
        K: (3, 3); world_from_cam: (4, 4) OpenCV axes.
        positions: (T, 3) metres in the world.
        openness: (T,) in [0, 1].
        thickness: of the line in pixels; None: by the image's width.
    """
    canvas = np.ascontiguousarray(image).copy()
    pixels, visible = project(np.asarray(positions, np.float64), K, world_from_cam)
    height, width = canvas.shape[:2]
    visible &= (np.abs(pixels) < 8 * max(height, width)).all(-1)  # OpenCV's fixed point overflows far outside
    fixed = np.round(np.where(visible[:, None], pixels, 0) * 2**_SUBPIXEL_BITS).astype(int)
    steps = len(fixed)
    thickness = max(1, round(width / 130)) if thickness is None else thickness
    shades = [tuple(int(c * (0.35 + 0.65 * i / max(steps - 1, 1))) for c in color) for i in range(steps)]
    for i in range(steps - 1):
        if visible[i] and visible[i + 1]:
            cv2.line(canvas, fixed[i], fixed[i + 1], shades[i], thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    for i in range(0, steps, max(1, steps // 16)):
        if visible[i]:
            closed = openness is not None and openness[i] < 0.5
            radius = (thickness if closed else 2 * thickness) * 2**_SUBPIXEL_BITS
            tint = (255, 255, 255) if closed else shades[i]
            cv2.circle(canvas, fixed[i], radius, tint, -1, cv2.LINE_AA, _SUBPIXEL_BITS)
    return canvas


def draw_states(
    image: np.ndarray,
    K: np.ndarray,
    world_from_cam: np.ndarray,
    states: np.ndarray,
    color: tuple[int, int, int] = PREDICTED,
) -> np.ndarray:
    """As :func:`draw_trajectory` for every arm of states (T, Nee, 17)."""
    for arm in range(states.shape[1]):
        positions = states[:, arm, :16].reshape(-1, 4, 4)[:, :3, 3]
        image = draw_trajectory(image, K, world_from_cam, positions, states[:, arm, 16], color)
    return image
