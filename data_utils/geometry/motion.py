"""How fast a hand moves, and whether a camera moves with it."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

FAR = 100.0  # metres from the world's origin: further than an arm is, in the same unit
FASTEST_HAND = 10.0  # metres a second, in the median of its motion: no arm, but another unit


def median_speed(world_from_ee: np.ndarray, times: np.ndarray) -> float:
    """Of poses (T, 4, 4) at increasing times (T,), over the steps in which it moves; 0 where it never does."""
    steps, gaps = np.linalg.norm(np.diff(world_from_ee[:, :3, 3], axis=0), axis=1), np.diff(times)
    moving = (steps > 0) & (gaps > 0)
    return float(np.median(steps[moving] / gaps[moving])) if moving.any() else 0.0


def turning(world_from_ee: np.ndarray, world_from_cam: np.ndarray) -> float:
    """Degrees by which a camera turns against a hand at most, of rotations (T, 3, 3) each."""
    ee_from_cam = Rotation.from_matrix(world_from_ee.transpose(0, 2, 1) @ world_from_cam)
    return float(np.degrees((ee_from_cam[0].inv() * ee_from_cam).magnitude().max()))


def other_orders(rotations: np.ndarray) -> list[np.ndarray]:
    """(T, 3, 3) as they are if the numbers w, x, y, z of their quaternions were read as x, y, z, w, and the reverse."""
    quaternions = Rotation.from_matrix(rotations).as_quat()  # x, y, z, w as they were read
    return [Rotation.from_quat(np.roll(quaternions, shift, axis=1)).as_matrix() for shift in (1, -1)]
