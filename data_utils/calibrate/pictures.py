"""Where calibration's pictures come from: a folder, a video, or a camera of a recorded episode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data_utils.data_loc import EPISODE_SUFFIXES
from data_utils.errors import DataError
from data_utils.h5io import Episode
from data_utils.video import VideoCache, open_video

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm")


@dataclass(frozen=True)
class Picture:
    """``image`` (H, W, 3) uint8 RGB; ``world_from_ee`` (Nee, 4, 4) and ``K`` (3, 3) where it is an episode's."""

    name: str
    image: np.ndarray
    world_from_ee: np.ndarray | None = None
    K: np.ndarray | None = None


def read_pictures(path: Path, camera: str, most: int) -> Iterator[Picture]:
    """Pictures of one size, one after the other.

    Args:
        path: a folder of pictures, a video, or an episode file.
        camera: of the episode.
        most: pictures of a video or an episode, evenly spaced; a folder's are all taken.
    Raises:
        DataError: nothing there, a picture that cannot be read, or one of another size than the first.
    """
    if path.is_dir():
        found = _of_folder(path)
    elif path.suffix in EPISODE_SUFFIXES:
        found = _of_episode(path, camera, most)
    elif path.suffix.lower() in VIDEOS and path.is_file():
        found = _of_video(path, most)
    else:
        raise DataError(f"{path}: no folder of pictures, no video and no episode file; name one of them", "location")
    first: Picture | None = None
    for picture in found:
        first = first or picture
        (height, width), (h, w) = first.image.shape[:2], picture.image.shape[:2]
        if (h, w) != (height, width):
            what = f"{picture.name} is {w} x {h}, {first.name} is {width} x {height}"
            raise DataError(f"{path}: {what}; wanted pictures of one size, of one camera", "image")
        yield picture


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` numbers from 0 on, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def _of_folder(path: Path) -> Iterator[Picture]:
    files = sorted(item for item in path.iterdir() if item.suffix.lower() in PICTURES)
    if not files:
        raise DataError(f"{path}: holds no pictures ({', '.join(PICTURES)}); take some of the board first", "location")
    for file in files:
        image = cv2.imread(str(file), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise DataError(f"{file}: is not a picture that can be read; remove it, or take it again", "image")
        yield Picture(file.name, image)


def _of_video(path: Path, most: int) -> Iterator[Picture]:
    reader = open_video(path, "pyav")
    try:
        for frame in evenly(len(reader), most):
            yield Picture(f"{path.name} frame {frame}", reader.read(frame))
    finally:
        reader.close()


def _of_episode(path: Path, camera: str, most: int) -> Iterator[Picture]:
    with contextlib.closing(VideoCache("pyav")) as videos, Episode(path, [camera], videos=videos) as episode:
        for frame in evenly(len(episode), most):
            seen = episode.camera_frame(camera, frame)
            yield Picture(f"{path.name} frame {frame}", seen.rgb, episode.world_from_ee[frame], seen.K)
