"""Bring the videos that an episode refers to into the output folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path

from data_utils.errors import DataError
from data_utils.h5io import EpisodeData, VideoFrames


def with_own_videos(data: EpisodeData, episode: Path, folder: Path) -> EpisodeData:
    """The episode with its videos in ``folder``: hard links where the file system allows, else copies.

    Args:
        data: an episode whose ``video_root`` is absolute; itself where it has no videos.
        episode: its file, which will find the videos by a relative path.
        folder: takes the videos under the paths that they have below their root.
    Raises:
        DataError: a video cannot be read or written.
    """
    paths: set[str] = set()
    for camera in data.cameras.values():
        if isinstance(camera.frames, VideoFrames):
            of_camera = camera.frames.path
            paths.update([of_camera] if isinstance(of_camera, str) else of_camera)
    if not paths:
        return data
    for path in sorted(paths):
        try:
            _bring(Path(data.video_root) / path, folder / path)
        except OSError as error:
            raise DataError(
                f"{folder / path}: cannot be made from {data.video_root}/{path} ({error})", "video"
            ) from error
    return dataclasses.replace(data, video_root=os.path.relpath(folder, episode.parent))


def _bring(source: Path, target: Path) -> None:
    if target.exists() and target.stat().st_size == source.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source.resolve(), temporary)
        if not temporary.exists():
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
