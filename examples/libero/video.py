"""What an episode's video shows: both cameras with the path that is being followed, and what the policy was told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_utils.drawing.captions import FAINT, TEXT, text_band
from data_utils.drawing.mp4 import VideoWriter
from data_utils.drawing.paths import draw_trajectory, enlarge
from examples.libero.rollout import Plan

if TYPE_CHECKING:
    from examples.libero.simulator import LiberoEnv

HEIGHT = 384  # pixels of an image in a video, about: lines are then finer than the rendered pixels
CONTROL_RATE = 20  # Hz
GREEN, RED = (90, 210, 110), (235, 95, 85)
END_SECONDS = 1.0  # for which the outcome stays


class EpisodeVideo:
    """Context manager that films an episode: a frame at every ``every``-th control step, and the outcome.

    The file appears when the context is left without an exception.
    """

    def __init__(self, path: Path, env: LiberoEnv, instruction: str, every: int) -> None:
        self._env, self._instruction, self._every = env, instruction, every
        self._rate = CONTROL_RATE / every
        self._writer = VideoWriter(path, self._rate)
        self._plan: Plan | None = None

    def __enter__(self) -> "EpisodeVideo":
        self._writer.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._writer.__exit__(*exception)

    def add(self, plan: Plan) -> None:
        """The present moment, with where ``plan`` leads."""
        self._plan = plan
        if self._env.time % self._every == 0:
            self._writer.add(self._view("running", TEXT))

    def end(self, success: bool) -> None:
        """The last moment and the outcome."""
        image = self._view("success", GREEN) if success else self._view("no success", RED)
        for _ in range(max(1, round(END_SECONDS * self._rate))):
            self._writer.add(image)

    def _view(self, outcome: str, color: tuple[int, int, int]) -> np.ndarray:
        """(H, W, 3) uint8, H and W even."""
        path, openness = self._path()
        views = []
        for camera in self._env.cameras:
            image, K = self._env.rgb(camera), self._env.intrinsics(camera)
            image, K = enlarge(image, K, max(1, round(HEIGHT / len(image))))
            if path is not None:
                image = draw_trajectory(image, K, self._env.world_from_cam(camera), path[:, :3, 3], openness)
            views.append(image)
        image = np.concatenate(views, axis=1)
        lines = [(self._instruction, 16, TEXT), (f"step {self._env.time}", 14, FAINT), (outcome, 14, color)]
        image = np.concatenate([image, text_band(image.shape[1], lines)])
        return image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2]

    def _path(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Poses (N, 4, 4) and openness (N,) to draw."""
        if self._plan is None:
            return None, None
        return (self._plan.poses, self._plan.openness) if self._plan.path is None else (self._plan.path, None)
