"""What an episode's video shows: every camera, with the path the policy is following drawn in."""

from __future__ import annotations

import cv2
import numpy as np

from data_utils.drawing.paths import draw_trajectory, enlarge
from examples.pickplace.env import PickPlaceEnv

SCALE = 2  # of the rendered images, so that the drawing is finer than their pixels


def camera_views(env: PickPlaceEnv, path: np.ndarray | None) -> np.ndarray:
    """The present state on all cameras side by side, (H, W, 3) uint8 RGB; ``path`` is (N, 4, 4) ``world_from_ee``."""
    views = []
    for camera in env.scene.cameras:
        image, K = enlarge(env.renderer.rgb(camera), env.renderer.intrinsics(camera), SCALE)
        if path is not None:
            image = draw_trajectory(image, K, env.renderer.world_from_cam(camera), path[:, :3, 3])
        views.append(image)
    return np.concatenate(views, axis=1)


def episode_view(env: PickPlaceEnv, path: np.ndarray | None) -> np.ndarray:
    """:func:`camera_views` with the instruction."""
    image = camera_views(env, path)
    place = (8, image.shape[0] - 10)
    return cv2.putText(image, env.prompt, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
