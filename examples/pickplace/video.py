"""Episode videos with the path the policy is following drawn into every camera."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from examples.pickplace.env import PickPlaceEnv

SCALE = 2  # of the rendered images, so that the drawing is finer than their pixels
NEAR = 0.02  # m in front of the camera, nearer points are not drawn


def project(points: np.ndarray, world_from_cam: np.ndarray, K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 2) of world points (N, 3), and which of them lie in front of the camera (N,) bool."""
    in_camera = (points - world_from_cam[:3, 3]) @ world_from_cam[:3, :3]
    in_front = in_camera[:, 2] > NEAR
    depth = np.where(in_front, in_camera[:, 2], 1.0)
    pixels = in_camera[:, :2] / depth[:, None] * [K[0, 0], K[1, 1]] + [K[0, 2], K[1, 2]]
    return pixels, in_front


def draw_path(image: np.ndarray, path: np.ndarray, world_from_cam: np.ndarray, K: np.ndarray, scale: int) -> np.ndarray:
    """``image`` (H, W, 3) enlarged by ``scale`` with a path of poses (N, 4, 4) on it, red now to yellow later."""
    canvas = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    pixels, in_front = project(path[:, :3, 3], world_from_cam, K)
    limit = 4 * max(canvas.shape)
    corners = np.clip(np.rint(pixels * scale), -limit, limit).astype(int)
    for i in range(len(path) - 1):
        if in_front[i] and in_front[i + 1]:
            green = int(255 * i / max(len(path) - 2, 1))
            cv2.line(
                canvas, tuple(map(int, corners[i])), tuple(map(int, corners[i + 1])), (255, green, 0), 2, cv2.LINE_AA
            )
    return canvas


class EpisodeVideo:
    """Context manager that writes an H.264 MP4 of all cameras side by side; it appears when it is whole."""

    def __init__(self, path: Path, fps: int = 20) -> None:
        self.path, self._fps = path, fps
        self._temporary = path.with_name(f".{path.stem}.tmp.mp4")
        self._stream = None

    def __enter__(self) -> "EpisodeVideo":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._temporary), "w")
        return self

    def add(self, env: PickPlaceEnv, path: np.ndarray | None) -> None:
        """Renders the present state; ``path`` (N, 4, 4) is drawn where there is one."""
        views = []
        for camera in env.scene.cameras:
            renderer = env.renderer
            poses = np.zeros((0, 4, 4)) if path is None else path
            views.append(
                draw_path(
                    renderer.rgb(camera), poses, renderer.world_from_cam(camera), renderer.intrinsics(camera), SCALE
                )
            )
        image = np.concatenate(views, axis=1)
        cv2.putText(image, env.prompt, (8, image.shape[0] - 10), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, 16)
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=Fraction(self._fps))
            self._stream.height, self._stream.width = image.shape[0], image.shape[1]
            self._stream.pix_fmt = "yuv420p"
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))

    def __exit__(self, exception_type, exception, traceback) -> None:
        if exception_type is None and self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()
        if exception_type is None and self._stream is not None:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink(missing_ok=True)
