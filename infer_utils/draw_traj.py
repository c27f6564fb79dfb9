"""Trajectories drawn on camera images: where the gripper goes, and whether it is open."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:  # simulators draw too, in environments without torch
    from data_utils.observation import CameraFrame

# Matplotlib-like, RGB: predicted samples first, recorded in green.
PREDICTED = (255, 64, 32)
RECORDED = (40, 220, 60)
ARM_COLORS = (PREDICTED, (60, 140, 255), (255, 200, 40), (200, 90, 255))
_NEAR = 0.01  # metres in front of the camera, below which a point is not drawn
_SUBPIXEL_BITS = 4


def project(points: np.ndarray, K: np.ndarray, world_from_cam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (..., 2) of world points (..., 3), and which lie in front of the camera (...,) bool."""
    rotation, origin = world_from_cam[:3, :3], world_from_cam[:3, 3]
    in_cam = (points - origin) @ rotation  # rows times R = R^T applied to columns
    depth = in_cam[..., 2]
    visible = depth > _NEAR
    pixels = (in_cam / np.where(visible, depth, 1.0)[..., None]) @ K.T
    return pixels[..., :2], visible


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


def draw_on_cameras(
    rgb: np.ndarray,
    K: np.ndarray,
    world_from_cam: np.ndarray,
    futures: list[tuple[np.ndarray, tuple[int, int, int]]],
    shown: np.ndarray | None = None,
    height: int = 256,
) -> np.ndarray:
    """Several futures on every camera side by side, images enlarged to about ``height`` so that lines stay fine.

    Args:
        rgb: (Ncam, 3, H, W) uint8.
        K: (Ncam, 3, 3); world_from_cam: (Ncam, 4, 4).
        futures: states (T, Nee, 17) and the colour of each.
        shown: (Ncam,) bool, cameras to draw on (a padded camera has no pose); None: all.
    """
    scale = max(1, round(height / rgb.shape[2]))
    tiles = []
    for camera, image in enumerate(rgb):
        tile, enlarged_K = enlarge(np.ascontiguousarray(image.transpose(1, 2, 0)), K[camera], scale)
        for states, color in futures if shown is None or shown[camera] else []:
            tile = draw_states(tile, enlarged_K, world_from_cam[camera], states, color)
        tiles.append(tile)
    return np.concatenate(tiles, axis=1)


def draw_plan(cameras: Iterable[CameraFrame], poses: np.ndarray, openness: np.ndarray, height: int = 256) -> np.ndarray:
    """Every sample and arm of a plan on every camera, side by side, (H, W, 3) uint8 RGB.

    Each arm has a colour of its own. The first sample, which is the one to execute, is drawn last and thick, the others
    thin. Images smaller than ``height`` are enlarged to about that, all tiles then brought to the first one's height.

    Args:
        cameras: images and where they were taken from.
        poses: (S, T, Nee, 4, 4) ``world_from_ee``; openness: (S, T, Nee) in [0, 1].
    """
    tiles = []
    for camera in cameras:
        scale = max(1, round(height / camera.rgb.shape[0]))
        tile, K = enlarge(camera.rgb, camera.K, scale)
        for sample in reversed(range(len(poses))):
            for arm in range(poses.shape[2]):
                path, opening = poses[sample, :, arm, :3, 3], openness[sample, :, arm]
                color = ARM_COLORS[arm % len(ARM_COLORS)]
                tile = draw_trajectory(tile, K, camera.world_from_cam, path, opening, color, 1 if sample else None)
        tiles.append(tile)
    first = tiles[0].shape[0]
    scaled = [cv2.resize(tile, (round(tile.shape[1] * first / tile.shape[0]), first)) for tile in tiles]
    return np.concatenate(scaled, axis=1)
