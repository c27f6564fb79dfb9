"""LIBERO's form of the pose-to-action rule: the same servo, another threshold for the gripper."""

from __future__ import annotations

import numpy as np

from examples.control import pose_to_action

CLOSE_BELOW = float(np.nextafter(0.8, 1.0))  # a desired openness of 0.8 itself closes


def libero_action(world_from_ee_target: np.ndarray, openness_target: float, world_from_ee: np.ndarray) -> np.ndarray:
    """Action (7,) in [-1, 1] towards a target (4, 4); see :func:`examples.control.pose_to_action`."""
    return pose_to_action(world_from_ee_target, openness_target, world_from_ee, CLOSE_BELOW)
