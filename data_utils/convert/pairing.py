"""Which frame of a video belongs to a row of poses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_utils.video.index import VideoIndex, video_error
from data_utils.yaml_file import Wrong

WAYS = ("time", "number")


@dataclass(frozen=True)
class Pairing:
    """How rows and frames find each other; recorded in every converted file."""

    by: str = "time"
    """``time``: a row has the frame of its time stamp; ``number``: the first row has the first frame, and so on."""
    tolerance: float = 1e-4
    """Seconds between a row and its frame; LeRobot's own."""
    repeats: bool = False
    """Whether several rows may have one frame: of a camera that is slower than the rows."""

    def __post_init__(self) -> None:
        if self.by not in WAYS:
            raise Wrong(f"by is {self.by!r}; wanted {' or '.join(WAYS)}")
        if not self.tolerance > 0:
            raise Wrong(f"tolerance is {self.tolerance}; wanted seconds, more than 0")

    def __str__(self) -> str:
        within = "" if self.by == "number" else f", within {self.tolerance:g} s"
        return f"by {self.by}{within}{', frames may repeat' if self.repeats else ''}"


@dataclass(frozen=True)
class Share:
    """The part of a video that an episode's rows have, by the lengths of the episodes that share it."""

    before: int
    """Rows of the episodes that come before this one in the video."""
    in_all: int
    """Rows of all episodes in the video: its frames, where nothing lies between them."""


def paired(index: VideoIndex, times: np.ndarray, pairing: Pairing, share: Share) -> np.ndarray:
    """Times (T,) in the video at which each row finds its frame.

    Args:
        times: (T,) seconds in the video of the rows.
    Raises:
        DataError: rule ``video``: a row that is too far from every frame, or whose frame another row or episode has;
            says where, and the worst distance.
    """
    nearest = _nearest(index.times, times)
    first = share.before if share.in_all == len(index) else None  # of the episode's frames, where that is known
    if pairing.by == "number":
        return _by_number(index, times, int(nearest[0]), first, alone=share.in_all == len(times))
    distance = np.abs(index.times[nearest] - times)
    worst = int(np.argmax(np.where(np.isfinite(distance), distance, np.inf)))
    if not distance[worst] <= pairing.tolerance:
        raise video_error(
            index.path,
            f"row {worst}, at {times[worst]:.4f} s, is {distance[worst]:.4f} s from the nearest frame, the worst of "
            f"{len(times)}; wanted {pairing.tolerance:g} s (there is a frame every {index.frame_interval:.4f} s, from "
            f"{index.times[0]:.3f} to {index.times[-1]:.3f} s); pairing in the mapping widens it, or pairs by number",
        )
    if first is not None and nearest[0] != first:
        what = (
            f"row 0 has frame {nearest[0]}, and by the lengths of the episodes in this video frame {first} is its own"
        )
        raise video_error(
            index.path, f"{what}: when it begins in the video is off by {index.times[first] - times[0]:.4f} s"
        )
    steps = np.diff(nearest)
    if (wrong := np.flatnonzero(steps < (0 if pairing.repeats else 1))).size:
        row = int(wrong[0])
        where = f"rows {row} and {row + 1}, at {times[row]:.4f} and {times[row + 1]:.4f} s,"
        what = f"both have frame {nearest[row]}" if steps[row] == 0 else "go back in time"
        raise video_error(index.path, f"{where} {what}")
    return times


def _by_number(index: VideoIndex, times: np.ndarray, nearest: int, first: int | None, alone: bool) -> np.ndarray:
    if alone and len(index) != len(times):
        raise video_error(index.path, f"has {len(index)} frames for {len(times)} rows, which cannot pair by number")
    if first is None:
        first = nearest
        if abs(index.times[first] - times[0]) > index.frame_interval / 2:
            raise video_error(index.path, f"has no frame at {times[0]:.3f} s, where the episode begins")
    if first + len(times) > len(index):
        left = len(index) - first
        raise video_error(index.path, f"has {left} frames from {times[0]:.3f} s on for {len(times)} rows")
    return index.times[first : first + len(times)]


def _nearest(frames: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(T,) number of the frame that is nearest to each time."""
    after = np.clip(np.searchsorted(frames, times), 1, max(1, len(frames) - 1))
    if len(frames) == 1:
        return np.zeros(len(times), np.int64)
    return np.where(times - frames[after - 1] <= frames[after] - times, after - 1, after)
