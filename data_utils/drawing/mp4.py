"""Writing an MP4 frame by frame, so that a half-written one is never left under its name."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


class VideoWriter:
    """Context manager that writes H.264; the file appears when it is whole.

    Args:
        path: of the ``.mp4``.
        fps: frames per second.
    """

    def __init__(self, path: Path, fps: float = 20) -> None:
        self.path, self._fps = path, Fraction(fps).limit_denominator(1000)
        self._temporary = path.with_name(f".{path.stem}.tmp.mp4")
        self._stream = None

    def __enter__(self) -> "VideoWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._temporary), "w")
        return self

    def add(self, image: np.ndarray) -> None:
        """One frame, (H, W, 3) uint8 RGB, H and W even and the same for all."""
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._fps)
            self._stream.height, self._stream.width = image.shape[:2]
            self._stream.pix_fmt = "yuv420p"
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))

    def __exit__(self, exception_type, exception, traceback) -> None:
        whole = exception_type is None and self._stream is not None
        if whole:
            self._container.mux(self._stream.encode())
        self._container.close()
        if whole:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink(missing_ok=True)
