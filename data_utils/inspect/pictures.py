"""An episode as a person looks at it: the recorded path drawn into every camera, as a picture and as a video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from data_utils.cli import bar
from data_utils.drawing.captions import BACKGROUND, FAINT, TEXT, broken, text_band
from data_utils.drawing.mp4 import VideoWriter
from data_utils.drawing.paths import RECORDED, draw_states, draw_trajectory, enlarge
from data_utils.files import atomic_write
from data_utils.geometry.camera import project
from data_utils.h5io import Episode
from data_utils.inspect.calibrated import Calibrated

if TYPE_CHECKING:
    from data_utils.samples.dataset import H5DatasetMapBase  # needs torch, which takes seconds to import

TILE_HEIGHT = 320  # pixels of one camera's image
GAP = 6
ARM_COLORS = (RECORDED, (255, 176, 32), (80, 176, 255), (255, 96, 200))
AXIS_COLORS = ((255, 70, 70), (90, 235, 90), (90, 150, 255))  # x, y, z
AXIS_LENGTH = 0.06  # metres
LEGEND = (
    "Line: where the end-effector goes next, dark to bright. Coloured dots: gripper open, small white dots: closed. "
    "Cross: its axes now, x red, y green, z blue (6 cm)."
)
DEFAULT_FPS = 20.0  # for episodes that count steps instead of seconds


def frames_picture(
    episode: Episode,
    cameras: Sequence[str],
    frames: Sequence[int],
    horizon: int,
    calibrated: Calibrated | None = None,
) -> np.ndarray:
    """One row per frame, one column per camera; (H, W, 3) uint8.

    Args:
        episode: open.
        cameras: of the columns.
        frames: of the rows.
        horizon: frames of the future that are drawn.
        calibrated: where cameras are, if not where they were recorded to be.
    """
    rows = [_row(episode, cameras, frame, horizon, calibrated) for frame in frames]
    width = max(row.shape[1] for row in rows)
    rows = [_padded(row, width) for row in rows]
    title = text_band(width, [(f"{episode.path.name}: {_prompts(episode)}", 17, TEXT)])
    return np.concatenate([title, *rows, text_band(width, [(LEGEND, 13, FAINT)])])


def policy_picture(dataset: "H5DatasetMapBase", frames: Sequence[int]) -> np.ndarray:
    """What the policy sees of the dataset's first episode, one row per frame: letterboxed, with its own horizon.

    Args:
        dataset: not in training, so that cameras stay in order and nothing is augmented.
        frames: of the rows.
    """
    config, rng = dataset.config, np.random.default_rng(0)
    samples = [dataset.sample(0, rng, frame) for frame in frames]
    rows = []
    for frame, sample in zip(frames, samples, strict=True):
        tiles = []
        for camera in range(config.num_cameras):
            image = np.ascontiguousarray(sample.rgb[-1, camera].transpose(1, 2, 0))
            scale = max(1, round(TILE_HEIGHT / image.shape[0]))
            tile, K = enlarge(image, sample.K[camera], scale)
            future = sample.future[:, sample.valid_ee]
            tiles.append(draw_states(tile, K, sample.world_from_cam[-1, camera], future, RECORDED))
        rows.append(tile_row(tiles, [f"{camera} · frame {frame}" for camera in config.cameras]))
    height, width = config.image_hw
    horizon = f"{width} x {height}, {config.num_future} future states"
    title = text_band(rows[0].shape[1], [(f"{dataset.name}: “{samples[0].prompt}” ({horizon})", 17, TEXT)])
    return np.concatenate([title, *rows])


def write_video(
    path: Path,
    episode: Episode,
    cameras: Sequence[str],
    horizon: int,
    rate: float,
    calibrated: Calibrated | None = None,
) -> None:
    """The whole episode as an MP4 with the path drawn into every camera.

    Args:
        cameras: from left to right.
        horizon: frames of the future that are drawn.
        rate: frames per second of the recording; beyond what players show, 20 are shown.
        calibrated: where cameras are, if not where they were recorded to be.
    """
    with VideoWriter(path, rate if 4 <= rate <= 60 else DEFAULT_FPS) as video:
        for frame in bar(range(len(episode)), desc=f"video {path.name}", unit="frame", delay=2.0):
            row = _row(episode, cameras, frame, horizon, calibrated)
            # One line, as all frames of a video have one size.
            prompt, *rest = broken(episode.prompt(frame=frame), 16, row.shape[1] - 40)
            image = np.concatenate([text_band(row.shape[1], [(prompt + (" …" if rest else ""), 16, TEXT)]), row])
            video.add(np.ascontiguousarray(_padded(image[: len(image) // 2 * 2], -(-image.shape[1] // 2) * 2)))


def tile_row(tiles: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Images (h, w, 3) uint8 of one height side by side, each under its label."""
    gap = np.full((len(tiles[0]), GAP, 3), BACKGROUND, np.uint8)
    images = [part for tile in tiles for part in (tile, gap)][:-1]
    captions = [part for tile, label in zip(tiles, labels, strict=True) for part in
                (text_band(tile.shape[1], [(label, 13, FAINT)]), text_band(GAP, [("", 13, FAINT)]))][:-1]  # fmt: skip
    return np.concatenate([np.concatenate(captions, axis=1), np.concatenate(images, axis=1)])


def save_png(path: Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8; the file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))


def _row(
    episode: Episode, cameras: Sequence[str], frame: int, horizon: int, calibrated: Calibrated | None
) -> np.ndarray:
    tiles = [_tile(episode, camera, frame, horizon, calibrated) for camera in cameras]
    time = episode.timestamps[frame] - episode.timestamps[0]
    return tile_row(tiles, [f"{camera} · frame {frame} · {time:.4g} s" for camera in cameras])


def _tile(episode: Episode, camera: str, frame: int, horizon: int, calibrated: Calibrated | None) -> np.ndarray:
    """A camera's image of height TILE_HEIGHT with the path of every arm."""
    seen = episode.camera_frame(camera, frame) if calibrated is None else calibrated.frame(camera, frame)
    image, K, world_from_cam = seen.rgb, seen.K, seen.world_from_cam
    if seen.mask is not None:
        image = np.where(seen.mask[..., None], image, image // 3)
    height, width = image.shape[:2]
    size = (round(width * TILE_HEIGHT / height), TILE_HEIGHT)
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if height > TILE_HEIGHT else cv2.INTER_CUBIC)
    K = K * [[size[0] / width], [size[1] / height], [1.0]]
    for number, arm in enumerate(episode.arms):
        poses = episode.world_from_ee[frame : frame + horizon + 1, arm]
        openness = episode.gripper[frame : frame + horizon + 1, arm]
        color = ARM_COLORS[number % len(ARM_COLORS)]
        image = draw_trajectory(image, K, world_from_cam, poses[:, :3, 3], openness, color)
        _draw_axes(image, K, world_from_cam, poses[0])
    return image


def _draw_axes(image: np.ndarray, K: np.ndarray, world_from_cam: np.ndarray, world_from_ee: np.ndarray) -> None:
    """Draw the axes of a pose into ``image``."""
    points = np.concatenate([np.zeros((1, 3)), AXIS_LENGTH * np.eye(3)])  # in the end-effector's frame
    pixels, visible = project(points @ world_from_ee[:3, :3].T + world_from_ee[:3, 3], K, world_from_cam)
    if not (visible.all() and (np.abs(pixels) < 4 * max(image.shape)).all()):
        return
    fixed = np.round(pixels * 16).astype(int)
    for axis, color in enumerate(AXIS_COLORS):
        cv2.line(image, fixed[0], fixed[1 + axis], (0, 0, 0), 4, cv2.LINE_AA, 4)
        cv2.line(image, fixed[0], fixed[1 + axis], color, 2, cv2.LINE_AA, 4)


def _prompts(episode: Episode) -> str:
    others = len(episode.prompts) - 1
    return f"“{episode.prompts[0]}”" + (f" (+{others} more)" if others else "")


def _padded(image: np.ndarray, width: int) -> np.ndarray:
    """(H, width, 3) with background on the right."""
    filling = np.full((len(image), width - image.shape[1], 3), BACKGROUND, np.uint8)
    return np.concatenate([image, filling], axis=1)
