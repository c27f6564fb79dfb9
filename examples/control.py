"""The one rule that turns a desired end-effector pose into an action of the OSC_POSE controller.

The controller re-anchors to the current pose at every step: an action is a set-point *offset*, 1 standing for
0.05 m or 0.5 rad about the world's axes. A target is therefore followed in closed loop, from the newest pose.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

MAX_TRANSLATION = 0.05  # m, what an action of 1 asks for
MAX_ROTATION = 0.5  # rad
CLOSE_BELOW = 0.5  # a desired openness below this closes the gripper: only the sign of the command counts


def pose_to_action(
    world_from_ee_target: np.ndarray,
    openness_target: float,
    world_from_ee: np.ndarray,
    close_below: float = CLOSE_BELOW,
) -> np.ndarray:
    """Action (7,) in [-1, 1] that moves the gripper from ``world_from_ee`` (4, 4) towards the target (4, 4).

    The first three numbers move along the world's axes, the next three turn about them, the last closes (1) or
    opens (-1) the gripper. Raises ``ValueError`` for a target that is not finite or not 4x4.
    """
    target = np.asarray(world_from_ee_target, dtype=np.float64)
    if target.shape != (4, 4) or not np.isfinite(target).all() or not np.isfinite(openness_target):
        raise ValueError(
            f"pose target of shape {target.shape} with openness {openness_target}; wanted finite numbers and (4, 4)"
        )
    translation = target[:3, 3] - world_from_ee[:3, 3]
    rotation = Rotation.from_matrix(target[:3, :3] @ world_from_ee[:3, :3].T).as_rotvec()
    action = np.concatenate([translation / MAX_TRANSLATION, rotation / MAX_ROTATION, [0.0]])
    action = np.clip(action, -1.0, 1.0)
    action[6] = 1.0 if openness_target < close_below else -1.0
    return action


def limit_pose(world_from_ee_target: np.ndarray, world_from_ee: np.ndarray) -> np.ndarray:
    """The pose (4, 4) on the way to the target that one action can ask for: at most 0.05 m and 0.5 rad away.

    The offset keeps its direction, so that a limited target lies on the straight line to the target itself.
    """
    translation = world_from_ee_target[:3, 3] - world_from_ee[:3, 3]
    rotation = Rotation.from_matrix(world_from_ee_target[:3, :3] @ world_from_ee[:3, :3].T).as_rotvec()
    translation *= min(1.0, MAX_TRANSLATION / max(np.linalg.norm(translation), 1e-9))
    rotation *= min(1.0, MAX_ROTATION / max(np.linalg.norm(rotation), 1e-9))
    limited = np.eye(4)
    limited[:3, :3] = Rotation.from_rotvec(rotation).as_matrix() @ world_from_ee[:3, :3]
    limited[:3, 3] = world_from_ee[:3, 3] + translation
    return limited
