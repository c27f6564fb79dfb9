"""Where a gripper can hold a thing: poses from above, the best first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GRASPS = 4  # tried one after the other
MAX_WIDTH = 0.075  # m, of what fits between the fingers
# The open gripper seen along its approach, half extents along and across the closing direction (m): fingers reach
# below the grip site, the hand begins above it.
FINGERS, FINGERS_BELOW = np.array([0.062, 0.014]), 0.012
HAND, HAND_ABOVE = np.array([0.105, 0.035]), 0.035
DEEP, SHALLOW = 0.035, 0.016  # m below a thing's top
CLEARANCE = 0.03  # m: more room than this makes a grasp no better
COLLISION_WEIGHT = 3.0


@dataclass(frozen=True)
class Grasp:
    world_from_ee: np.ndarray
    """(4, 4)."""
    cost: float


def top_grasps(
    points: np.ndarray, others: np.ndarray, goal: np.ndarray, narrow: np.ndarray | None = None
) -> list[Grasp]:
    """Grasps from above of a thing of ``points`` (N, 3) across its narrow sides, the best first.

    Args:
        others: (M, 3) points of everything else.
        goal: where it will be put down; of no concern here.
        narrow: (2,) direction in which there is no room for the hand there.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    middle = (low + high)[:2] / 2
    depth, held = DEEP, points
    if _narrowest(points) > MAX_WIDTH:  # by what stands up from it, a lid's knob
        depth, held = SHALLOW, points[points[:, 2] > high[2] - SHALLOW - FINGERS_BELOW]
        middle = (held.min(axis=0) + held.max(axis=0))[:2] / 2
    at = np.array([*middle, max(low[2] + 0.006, high[2] - depth)])
    grasps = []
    for angle in np.arange(0.0, np.pi, np.pi / 36):
        along = np.array([np.cos(angle), np.sin(angle)])
        width = np.ptp(held[:, :2] @ along)
        pose = gripper_down(at, along)
        too_wide = max(0.0, width - MAX_WIDTH)
        cost = width + 0.004 * abs(angle - np.pi / 2) + 20 * too_wide + _crowding(pose, others) + _wide(along, narrow)
        grasps.append(Grasp(pose, cost))
    return _distinct(grasps)


def _narrowest(points: np.ndarray) -> float:
    angles = np.arange(0.0, np.pi, np.pi / 36)
    return float(np.ptp(points[:, :2] @ np.stack([np.cos(angles), np.sin(angles)]), axis=0).min())


def rim_grasps(
    points: np.ndarray, others: np.ndarray, goal: np.ndarray, narrow: np.ndarray | None = None
) -> list[Grasp]:
    """Grasps from above of the rim of a round thing of ``points`` (N, 3), the best first: one finger inside, the
    other outside, on the side that turns the wrist least and is away from ``goal`` (3,); ``narrow`` as in
    :func:`top_grasps`."""
    low, high = points.min(axis=0), points.max(axis=0)
    centre = (low + high)[:2] / 2
    radius = np.linalg.norm(points[points[:, 2] > high[2] - 0.01][:, :2] - centre, axis=1).mean()
    grasps = []
    for angle in np.arange(-np.pi, np.pi, np.pi / 12):
        outward = np.array([np.cos(angle), np.sin(angle)])
        pose = gripper_down(np.array([*(centre + radius * outward), high[2] - 0.026]), outward)
        towards_goal = outward @ (goal[:2] - centre) > 0
        turned = 0.02 * abs(np.cos(angle)) + 0.004 * towards_goal
        grasps.append(Grasp(pose, turned + _crowding(pose, others) + _wide(outward, narrow)))
    return _distinct(grasps)


def gripper_down(position: np.ndarray, closing: np.ndarray) -> np.ndarray:
    """Pose (4, 4) of a gripper that points down at ``position`` (3,) and closes along ``closing`` (2,), in whichever of
    the two senses is nearer to world y."""
    x = np.array([*closing, 0.0]) / np.linalg.norm(closing) * (1.0 if closing[1] >= 0 else -1.0)
    z = np.array([0.0, 0.0, -1.0])
    pose = np.eye(4)
    pose[:3, :3] = np.stack([x, np.cross(z, x), z], axis=1)
    pose[:3, 3] = position
    return pose


def gripper_towards(
    position: np.ndarray, approach: np.ndarray, closing: np.ndarray, world_from_ee: np.ndarray
) -> np.ndarray:
    """Pose (4, 4) of a gripper at ``position`` (3,) that points along ``approach`` (3,) and closes along ``closing``
    (3,), square to it, in whichever of the two senses is the smaller turn from ``world_from_ee`` (4, 4)."""
    z = approach / np.linalg.norm(approach)
    x = closing / np.linalg.norm(closing)
    axes = [np.stack([sense * x, np.cross(z, sense * x), z], axis=1) for sense in (1.0, -1.0)]
    pose = np.eye(4)
    pose[:3, :3] = max(axes, key=lambda found: np.trace(found.T @ world_from_ee[:3, :3]))
    pose[:3, 3] = position
    return pose


def _wide(closing: np.ndarray, narrow: np.ndarray | None) -> float:
    """What it costs that the hand, wide along ``closing`` (2,), is put down where there is no room for it."""
    return 0.0 if narrow is None else 0.1 * abs(closing @ narrow)


def _crowding(world_from_ee: np.ndarray, others: np.ndarray) -> float:
    """How much of ``CLEARANCE`` a gripper that comes straight down to a pose lacks (m), where it weighs most; what it
    would run into weighs more."""
    if not len(others):
        return 0.0
    local = (others - world_from_ee[:3, 3]) @ world_from_ee[:3, :3]  # z down
    gap = CLEARANCE
    for extent, lowest in ((FINGERS, FINGERS_BELOW), (HAND, -HAND_ABOVE)):
        beside = np.abs(local[local[:, 2] < lowest][:, :2]) - extent
        outside = np.linalg.norm(np.maximum(beside, 0.0), axis=1)
        gap = min(gap, (outside + np.minimum(beside.max(axis=1), 0.0)).min(initial=gap))
    return CLEARANCE - gap + COLLISION_WEIGHT * max(0.0, -gap)


def _distinct(grasps: list[Grasp]) -> list[Grasp]:
    """The best first; then each as different from those before as it is good, for when they failed."""
    left = sorted(grasps, key=lambda grasp: grasp.cost)
    chosen = [left.pop(0)]
    while left and len(chosen) < GRASPS:
        left = [grasp for grasp in left if min(_angle(grasp, other) for other in chosen) > np.pi / 7] or left
        chosen.append(left.pop(0))
    return chosen


def _angle(one: Grasp, other: Grasp) -> float:
    """Between two grasps: how far the hand turns or moves round, whichever is plainer (rad)."""
    turn = np.arccos(np.clip(one.world_from_ee[:3, 0] @ other.world_from_ee[:3, 0], -1.0, 1.0))
    moved = np.linalg.norm(one.world_from_ee[:3, 3] - other.world_from_ee[:3, 3])
    return max(turn, moved / 0.05)
