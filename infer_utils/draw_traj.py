"""Trajectories drawn on camera images: where the gripper goes, and whether it is open."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np

from data_utils.drawing.captions import FAINT, TEXT, text_band
from data_utils.drawing.paths import PREDICTED, RECORDED, draw_states, draw_trajectory, enlarge
from data_utils.geometry.camera import CameraFrame

ARM_COLORS = (PREDICTED, (60, 140, 255), (255, 200, 40), (200, 90, 255))
_DOTS = "dark to bright: now to later; large dots: gripper open, small white ones: closed"
COMPARISON_LEGEND = (
    ("red: predicted by the policy", 13, PREDICTED),
    ("green: recorded", 13, RECORDED),
    (_DOTS, 13, FAINT),
)
"""Lines of ``text_band`` for pictures of predicted and recorded paths."""


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


def draw_plan(
    cameras: Mapping[str, CameraFrame], poses: np.ndarray, openness: np.ndarray, height: int = 256
) -> np.ndarray:
    """Every sample and arm of a plan on every camera, side by side, with names and a legend; (H, W, 3) uint8 RGB.

    Each arm has a colour of its own. The first sample, which is the one to execute, is drawn last and thick, the others
    thin. Images smaller than ``height`` are enlarged to about that, all tiles then brought to the first one's height.

    Args:
        cameras: by name, images and where they were taken from.
        poses: (S, T, Nee, 4, 4) ``world_from_ee``; openness: (S, T, Nee) in [0, 1].
    """
    tiles = []
    for camera in cameras.values():
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
    image = np.concatenate(scaled, axis=1)
    names = [text_band(tile.shape[1], [(name, 12, TEXT)]) for name, tile in zip(cameras, scaled, strict=True)]
    tallest = max(len(band) for band in names)  # of names that were broken
    names = [np.concatenate([band, np.tile(band[:1], (tallest - len(band), 1, 1))]) for band in names]
    legend = [(_DOTS, 11, FAINT)]
    if len(poses) > 1:
        legend.insert(0, (f"thick: the sample to execute, thin: {len(poses) - 1} more", 11, FAINT))
    if poses.shape[2] > 1:
        legend += [(f"arm {arm}", 11, ARM_COLORS[arm % len(ARM_COLORS)]) for arm in range(poses.shape[2])]
    return np.concatenate([np.concatenate(names, axis=1), image, text_band(image.shape[1], legend)], axis=0)
