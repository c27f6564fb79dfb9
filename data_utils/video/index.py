"""Which frames a video file holds and when they are shown, read from its container without decoding anything."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_utils.errors import DataError
from data_utils.files import atomic_write
from data_utils.words import one_line

if TYPE_CHECKING:
    import av

CACHED_FROM_BYTES = 32 * 2**20


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video that are shown, in the order of their times.

    Attributes:
        path: the file.
        codec: of the stream, as FFmpeg names it, e.g. "h264".
        pts: (N,) int64, presentation times in the stream's time base, increasing.
        times: (N,) float64, the same in seconds, as stored (a video need not begin at 0).
        frame_interval: median time between frames, seconds.
        keys: (M,) int64 pts of the frames from which decoding can begin, increasing.
        hidden: the container also holds frames that an edit list hides.
        keys_in_order: every key frame is stored at the place where it is shown. Not so where frames shown before a
            key frame are stored after it ("open" groups of pictures).
    """

    path: str
    codec: str
    pts: np.ndarray
    times: np.ndarray
    frame_interval: float
    keys: np.ndarray
    hidden: bool
    keys_in_order: bool

    def __len__(self) -> int:
        return len(self.pts)


def video_error(path: str, what: str) -> DataError:
    """A :class:`DataError` that names the video; ``what`` may be a library's message of several lines."""
    return DataError(f"{path}: {one_line(what, 300)}", "video")


def read_index(path: str | os.PathLike) -> VideoIndex:
    """Read the index of a video: one pass over its packets, a few milliseconds for a minute of video.

    Packets are read with their data, so the index of a large file (many episodes in one video) is kept on disk under
    ``$XDG_CACHE_HOME`` (else ``~/.cache``), and read from there as long as the file's size and time stay the same.

    Raises:
        DataError: rule "video": no such file, not a video, cut short, or without presentation times.
    """
    path = os.fspath(path)
    if not Path(path).is_file():
        raise video_error(
            path, "no such video; check the folder of the videos (video_root of the location, or of the episode file)"
        )
    if os.path.getsize(path) < CACHED_FROM_BYTES:
        return _demux(path)
    stored = _cache_file(path)
    if stored.is_file():
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(stored) as arrays:
            return VideoIndex(path=path, **{name: _scalar(arrays[name]) for name in arrays.files})
    index = _demux(path)
    with contextlib.suppress(OSError):  # a machine without a writable home reads the packets again
        _store(stored, index)
    return index


def _cache_file(path: str) -> Path:
    found = os.stat(path)
    name = f"{os.path.abspath(path)}\0{found.st_size}\0{found.st_mtime_ns}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "apt" / "video_index" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"


def _store(stored: Path, index: VideoIndex) -> None:
    stored.parent.mkdir(parents=True, exist_ok=True)
    arrays = {field.name: getattr(index, field.name) for field in dataclasses.fields(index) if field.name != "path"}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a name, numpy would add its own ending
            np.savez(file, **arrays)

    atomic_write(stored, write)


def _scalar(array: np.ndarray):
    return array if array.ndim else array.item()


def _demux(path: str) -> VideoIndex:
    import av

    try:
        with av.open(path, metadata_errors="replace") as container:
            if not container.streams.video:
                raise video_error(path, "has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise video_error(path, "has a video stream of a kind that FFmpeg does not know; is the file damaged?")
            _check_length(path, stream)
            packets = [packet for packet in container.demux(stream) if packet.size]
            return _index(path, stream, packets)
    except (av.FFmpegError, OSError) as error:
        raise video_error(
            path, f"is not a readable video ({error.strerror or error}); copy or record it again"
        ) from error


def _check_length(path: str, stream: av.VideoStream) -> None:
    """Refuse a file that ends before the last frame which its header promises (MP4; others have no such table)."""
    promised = max((entry.pos + entry.size for entry in stream.index_entries if entry.size), default=0)
    found = os.path.getsize(path)
    if promised > found:
        raise video_error(path, f"is cut short: {found} bytes, its header promises {promised}; copy or record it again")


def _index(path: str, stream: av.VideoStream, packets: list[av.Packet]) -> VideoIndex:
    damaged = next((i for i, packet in enumerate(packets) if packet.is_corrupt), None)
    if damaged is not None:
        raise video_error(path, f"is damaged or cut short at frame {damaged} as stored; copy or record it again")
    shown = [packet for packet in packets if not packet.is_discard]
    if not shown:
        raise video_error(path, "holds no frame; copy or record it again")
    if any(packet.pts is None for packet in shown):
        raise video_error(path, "does not store when frames are shown; convert it: ffmpeg -i IN -c:v libx264 OUT.mp4")
    stored = np.array([packet.pts for packet in shown], np.int64)
    is_key = np.array([packet.is_keyframe for packet in shown])
    order = np.argsort(stored, kind="stable")
    pts = stored[order]
    if (np.diff(pts) == 0).any():
        at = float(pts[:-1][np.diff(pts) == 0][0] * stream.time_base)
        raise video_error(path, f"has two frames at {at:.3f} s; encode it again")
    # Packets hidden by an edit list may hold the key frame that the first frame shown needs.
    keys = np.array(sorted(p.pts for p in packets if p.is_keyframe and p.pts is not None), np.int64)
    if not len(keys):
        raise video_error(path, "has no key frame; encode it again")
    base = stream.time_base
    times = pts * base.numerator / base.denominator
    if len(times) > 1:
        interval = float(np.median(np.diff(times)))
    else:
        interval = float((shown[0].duration or 0) * base)
    return VideoIndex(
        path=path,
        codec=stream.codec_context.codec.canonical_name,
        pts=pts,
        times=times,
        frame_interval=interval,
        keys=keys,
        hidden=len(shown) < len(packets),
        keys_in_order=bool((stored[is_key] == pts[is_key]).all()),
    )
