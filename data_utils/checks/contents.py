"""What an episode file holds, as plain values that can be printed and stored as JSON."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import pairwise

import h5py
import numpy as np

from data_utils.checks.visibility import camera_poses, frames_in_image, is_moving
from data_utils.episodes import schema
from data_utils.errors import DataError
from data_utils.geometry.resample import nearest_index
from data_utils.h5io import Episode
from data_utils.video import VideoCache
from data_utils.video.index import read_index
from data_utils.words import one_line

MEASURED_FRAMES = 16  # from which the mean size of a stored frame is taken
# Attributes that say how the file is stored, or that are shown elsewhere.
STORAGE_ATTRIBUTES = {
    schema.REMARKS_ATTR,
    *(schema.VERSION_ATTR, schema.JPEG_CHANNELS_ATTR, schema.CHECKSUMS_ATTR, schema.ATTRIBUTES_CHECKSUM_ATTR),
    *("compress", "ee_indices"),
}


@dataclass(frozen=True)
class CameraContents:
    """One camera.

    Args:
        storage: "jpeg", "raw" or "video".
        hw: height and width; (0, 0) where no frame could be read.
        bytes_per_frame: mean size as stored.
        moves: has a pose per frame, and they differ.
        masked: has masks.
        video: the first video file, "" where frames are in the episode file.
        frames_with_ee: per arm, in how many frames its end-effector is in the image; () where that cannot be told.
        pairing_error: of a video, seconds between a row and its nearest frame, at most; None where there is none.
        rows_sharing: of a video, how many rows have the frame of the row before.
    """

    storage: str
    hw: tuple[int, int]
    bytes_per_frame: float
    moves: bool
    masked: bool
    video: str = ""
    frames_with_ee: tuple[int, ...] = ()
    pairing_error: float | None = None
    rows_sharing: int = 0

    @classmethod
    def from_dict(cls, values: dict) -> "CameraContents":
        """Inverse of ``dataclasses.asdict``, also after a way through JSON."""
        return cls(**{**values, "hw": tuple(values["hw"]), "frames_with_ee": tuple(values["frames_with_ee"])})


@dataclass(frozen=True)
class Contents:
    """One episode.

    Args:
        version: schema version, 0 where the file has none.
        size: bytes of the file.
        frames, seconds: length; rate: frames per second, by the median step.
        num_ee: end-effectors; ee_indices: the file's own choice of arms, None where it makes none.
        desired: has commanded poses.
        prompts: the instruction and its paraphrases.
        subtasks: first frame and text of each.
        attributes: where the episode comes from.
    """

    version: int
    size: int
    frames: int
    seconds: float
    rate: float
    num_ee: int
    ee_indices: tuple[int, ...] | None
    desired: bool
    prompts: tuple[str, ...]
    subtasks: tuple[tuple[int, str], ...]
    cameras: dict[str, CameraContents] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[int, ...]:
        """The end-effectors that are arms: the file's own choice, else all."""
        return self.ee_indices or tuple(range(self.num_ee))

    @classmethod
    def from_dict(cls, values: dict) -> "Contents":
        """Inverse of ``dataclasses.asdict``, also after a way through JSON."""
        cameras = {name: CameraContents.from_dict(camera) for name, camera in values["cameras"].items()}
        lists = {name: tuple(values[name]) for name in ("prompts", "subtasks")}
        ee_indices = None if values["ee_indices"] is None else tuple(values["ee_indices"])
        return cls(**{**values, **lists, "cameras": cameras, "ee_indices": ee_indices})


def read_contents(path: str | os.PathLike, videos: VideoCache, video_root: str | None = None) -> Contents:
    """Read what a file holds.

    Raises:
        DataError: it cannot be read so far.
    """
    with Episode(path, None, video_root, videos) as episode:
        times = episode.timestamps
        attributes = episode.attributes
        return Contents(
            version=int(attributes.get(schema.VERSION_ATTR, 0)),
            size=os.path.getsize(path),
            frames=len(episode),
            seconds=float(times[-1] - times[0]),
            rate=_rate(times),
            num_ee=episode.num_ee,
            ee_indices=episode.ee_indices,
            desired=episode.has_desired,
            prompts=tuple(episode.prompts),
            subtasks=tuple(episode.subtasks),
            cameras={camera: _camera(episode, camera, videos) for camera in episode.cameras},
            attributes={
                name: one_line(_text(value))
                for name, value in sorted(attributes.items())
                if name not in STORAGE_ATTRIBUTES and "prompt_text" not in name
            },
        )


def _rate(times: np.ndarray) -> float:
    step = float(np.median(np.diff(times)))
    return 1 / step if step > 0 else (len(times) - 1) / float(times[-1] - times[0])


def _camera(episode: Episode, camera: str, videos: VideoCache) -> CameraContents:
    poses = camera_poses(episode, camera)
    video, bytes_per_frame = "", 0.0
    if episode.is_video(camera):
        storage = "video"
        video, _ = episode.video_location(camera, 0)
        bytes_per_frame = _video_bytes_per_frame(video, videos)
    else:
        storage, bytes_per_frame = _stored_frames(episode, f"{camera}/rgb")
    try:
        hw, masked = episode.rgb(camera, 0).shape[:2], episode.mask(camera, 0) is not None
    except DataError:  # named as a fault of the file
        hw, masked = (0, 0), False
    try:
        frames_with_ee = tuple(frames_in_image(episode, camera, hw).sum(0).tolist()) if hw[0] else ()
    except DataError:  # likewise
        frames_with_ee = ()
    pairing = _pairing(episode, camera) if video else (None, 0)
    return CameraContents(storage, hw, bytes_per_frame, is_moving(poses), masked, video, frames_with_ee, *pairing)


def _pairing(episode: Episode, camera: str) -> tuple[float | None, int]:
    """How far rows are from their frames at most, and how many have the frame of the row before."""
    places = [episode.video_location(camera, frame) for frame in range(len(episode))]
    try:
        indices = {path: read_index(path).times for path in dict.fromkeys(path for path, _ in places)}
    except DataError:  # named as a fault of the file
        return None, 0
    frames = [(path, int(nearest_index(indices[path], np.array([time]))[0])) for path, time in places]
    worst = max(abs(indices[path][frame] - time) for (path, frame), (_, time) in zip(frames, places, strict=True))
    return float(worst), sum(one == other for one, other in pairwise(frames))


def _stored_frames(episode: Episode, key: str) -> tuple[str, float]:
    """How frames are stored, and bytes per frame; 0 where they are damaged, which is named as a fault of the file."""
    with h5py.File(episode.path, "r") as file:
        frames = file[key]
        if frames.ndim == 4:
            return "raw", frames.id.get_storage_size() / len(frames)
        some = np.unique(np.linspace(0, len(frames) - 1, MEASURED_FRAMES).astype(int)).tolist()
        try:
            return "jpeg", float(np.mean([len(frames[frame]) for frame in some]))
        except (OSError, RuntimeError):
            return "jpeg", 0.0


def _video_bytes_per_frame(path: str, videos: VideoCache) -> float:
    try:
        first, last, interval = videos.span(path)
    except DataError:  # named as a fault of the file
        return 0.0
    return os.path.getsize(path) / (1 + (last - first) / interval)


def _text(value) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)
