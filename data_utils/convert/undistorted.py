"""Frames of a camera whose lens distorts, made those of a pinhole camera when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from data_utils.episodes.frames import FrameError, JpegDecoder
from data_utils.errors import DataError
from data_utils.h5io import VideoFrames
from data_utils.rig import RigCamera
from data_utils.video import VideoCache


class Undistorted(Sequence):
    """(H, W, 3) uint8 RGB each. A video's are decoded: they go into the episode file, as the video stays distorted.

    Args:
        frames: as ``CameraData`` takes them.
        camera: of the rig.
        video_root: folder that a video's path is relative to.
    """

    def __init__(self, frames: Sequence[np.ndarray] | VideoFrames, camera: RigCamera, video_root: str | None) -> None:
        self._frames = _Decoded(frames, video_root or "") if isinstance(frames, VideoFrames) else frames
        self._camera, self._jpegs = camera, JpegDecoder(swapped=False)

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> np.ndarray:
        frame = np.asarray(self._frames[index])
        if frame.ndim == 1:
            try:
                frame = self._jpegs.decode(frame)
            except FrameError as error:
                raise DataError(f"{self._camera.name}: frame {index} {error}", "image") from error
        return self._camera.undistort(frame)[0]


class _Decoded(Sequence):
    def __init__(self, frames: VideoFrames, root: str) -> None:
        paths = [frames.path] * len(frames.times) if isinstance(frames.path, str) else frames.path
        self._paths, self._times = [os.path.join(root, path) for path in paths], frames.times
        self._videos = VideoCache("pyav", max_open=1)

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._videos.frame(self._paths[index], float(self._times[index]))
