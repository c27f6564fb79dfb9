"""The videos that an episode refers to: which readers take them, and how they get into the output folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from functools import lru_cache
from pathlib import Path

from data_utils.errors import DataError
from data_utils.h5io import EpisodeData, VideoFrames
from data_utils.video.index import VideoIndex, read_index, video_error
from data_utils.video.readers import decord_misreads

FOLDER = "videos"  # below the output folder
TIME_STEP_NS = 2 * 10**9  # of the file system that stores a file's time most coarsely


@lru_cache(maxsize=16)
def video_index(path: str) -> VideoIndex:
    """The index of a video, which several episodes may share."""
    return read_index(path)


@lru_cache(maxsize=16)
def video_size(path: str) -> tuple[int, int]:
    """Width and height of a video's frames. Raises DataError where it cannot be read."""
    import av

    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            return stream.width, stream.height
    except (av.FFmpegError, OSError, IndexError) as error:
        raise video_error(path, f"cannot be read ({error})") from error


def decord_refuses(data: EpisodeData) -> frozenset[str]:
    """Why decord, training's default reader, refuses videos of an episode ("are AV1"); empty where it takes all."""
    reasons = {decord_misreads(video_index(str(Path(data.video_root) / path))) for path in _paths(data)}
    return frozenset(reasons - {""})


def with_own_videos(data: EpisodeData, episode: Path, out: Path) -> EpisodeData:
    """The episode with its videos in ``out/videos``: hard links where the file system allows, else copies.

    Args:
        data: an episode whose ``video_root`` is absolute; itself where it has no videos.
        episode: its file, which will find the videos by a relative path.
        out: takes the videos under the paths that they have below their root, in ``videos`` (once: LeRobot's paths
            begin so themselves).
    Raises:
        DataError: a video cannot be read or written.
    """
    paths = _paths(data)
    if not paths:
        return data
    folder = out if all(Path(path).parts[0] == FOLDER for path in paths) else out / FOLDER
    for path in sorted(paths):
        try:
            _bring(Path(data.video_root) / path, folder / path)
        except OSError as error:
            raise DataError(
                f"{folder / path}: cannot be made from {data.video_root}/{path} ({error})", "video"
            ) from error
    return dataclasses.replace(data, video_root=os.path.relpath(folder, episode.parent))


def _paths(data: EpisodeData) -> set[str]:
    """Of an episode's videos, relative to its ``video_root``."""
    paths: set[str] = set()
    for camera in data.cameras.values():
        if isinstance(camera.frames, VideoFrames):
            of_camera = camera.frames.path
            paths.update([of_camera] if isinstance(of_camera, str) else of_camera)
    return paths


def _bring(source: Path, target: Path) -> None:
    if target.exists() and _is_same(source.stat(), target.stat()):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source.resolve(), temporary)
        if not temporary.exists():
            shutil.copyfile(source, temporary)
            found = source.stat()
            os.utime(temporary, ns=(found.st_atime_ns, found.st_mtime_ns))
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _is_same(source: os.stat_result, target: os.stat_result) -> bool:
    """The same file, or a copy that was made of it (not of another dataset's video of this name and size)."""
    if os.path.samestat(source, target):
        return True
    return source.st_size == target.st_size and abs(source.st_mtime_ns - target.st_mtime_ns) <= TIME_STEP_NS
