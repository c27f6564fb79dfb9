"""In which frames the end-effectors are in a camera's image: few, where poses are given in another convention."""

from __future__ import annotations

import numpy as np

from data_utils.geometry.camera import project
from data_utils.h5io import Episode

STILL = 1e-6  # what the entries of a fixed camera's pose differ by at most


def camera_poses(episode: Episode, camera: str) -> np.ndarray:
    """(T, 4, 4) world_from_cam."""
    return np.stack([episode.world_from_cam(camera, frame) for frame in range(len(episode))])


def is_moving(poses: np.ndarray) -> bool:
    """Whether a camera with the poses (T, 4, 4) moves."""
    return bool(np.ptp(poses, axis=0).max() > STILL)


def frames_in_image(episode: Episode, camera: str, hw: tuple[int, int]) -> np.ndarray:
    """(T, arms) bool: the origin of the end-effector's frame is in the camera's image of ``hw`` (height, width).

    Arms are those that the file chooses, or all its end-effectors.

    Raises:
        DataError: a pose or K that cannot be used.
    """
    arms = list(episode.arms)
    origins = episode.world_from_ee[:, arms][..., :3, 3]  # (T, arms, 3)
    inside = np.zeros(origins.shape[:2], bool)
    for frame, points in enumerate(origins):
        pixels, in_front = project(points, episode.K(camera, frame), episode.world_from_cam(camera, frame))
        inside[frame] = in_front & (pixels >= 0).all(-1) & (pixels <= (hw[1], hw[0])).all(-1)
    return inside
