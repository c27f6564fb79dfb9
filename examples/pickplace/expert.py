"""A scripted expert that reads object poses from the simulator: above, down, grasp, lift, over, release, up.

Every step gives a desired pose within one action's reach of the current pose, so that a policy that learns the
desired poses is executed by the very rule that executed the expert.
"""

from __future__ import annotations

import enum

import numpy as np

from examples.control import limit_pose
from examples.pickplace.env import PickPlaceEnv, gripper_down

HAND_HALF_EXTENT = np.array([0.105, 0.035])  # m, the Panda's hand along and across the closing direction
HAND_ABOVE_GRIP = 0.03  # m, from the grip site up to the hand
CLEARANCE = 0.015  # m, kept between what moves and what stands
MAX_WRIST_TURN = 0.8  # rad from the neutral closing direction, world y; large turns are slow and swing the elbow
CLOSE_STEPS = 6  # the fingers need 4-5 steps from open to a firm hold
OPEN_STEPS = 3
FUNNEL_SLOPE = 3.0  # height kept over the goal per metre of sideways error
GRASP_LOST = 0.05  # m from grip site to object's box: nothing is held
PHASE_LIMIT = 60  # control steps before a phase is given up as stuck


class Phase(enum.Enum):
    APPROACH = 0
    CLOSE = 1
    LIFT = 2
    CARRY = 3
    OPEN = 4
    RETREAT = 5
    DONE = 6


class ScriptedExpert:
    """Picks the task's object and drops it into the task's container; goes back for it where the grasp failed."""

    path = None  # it decides on the next step alone

    def reset(self, env: PickPlaceEnv) -> None:
        """Plans for the environment's present state."""
        self.phase = Phase.APPROACH
        self._steps = 0
        self._plan(env)

    @property
    def done(self) -> bool:
        return self.phase is Phase.DONE

    @property
    def perturbable(self) -> bool:
        """Whether the motion is free enough to be pushed off its path: not next to the object or the container."""
        return self.phase in (Phase.APPROACH, Phase.CARRY) and self._sideways_error > 0.05

    def target(self, env: PickPlaceEnv) -> tuple[np.ndarray, float]:
        """Desired pose (4, 4) and openness for the next control step."""
        self._advance(env)
        position, openness = self._goal(env)
        pose = np.eye(4)
        pose[:3, :3] = self._rotation
        pose[:3, 3] = position
        return limit_pose(pose, env.world_from_ee), openness

    def grasp_pose(self) -> np.ndarray:
        """Pose (4, 4) of the gripper around the object, as it lay when last planned for."""
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = self._rotation, self._grasp
        return pose

    def _plan(self, env: PickPlaceEnv) -> None:
        task, scene = env.task, env.scene
        world_from_object = env.world_from_object(task.object)
        corners = _box_corners(env, task.object)
        bottom, top = corners[:, 2].min(), corners[:, 2].max()
        centre = (corners.min(axis=0) + corners.max(axis=0)) / 2
        grasp = scene.objects[task.object].grasp
        height = max(top - grasp.below_top, bottom + CLEARANCE)
        self._grasp = np.array([centre[0], centre[1], height])
        others = {name: _box_corners(env, name) for name in env.present if name != task.object}
        self._rotation = gripper_down(self._closing_yaw(env, world_from_object, others))
        tallest = max((points[:, 2].max() for points in others.values()), default=bottom)
        container = scene.containers[task.container]
        self._above = tallest + 2 * CLEARANCE  # the finger tips reach 12 mm below the grip site
        self._carry_height = max(tallest, container.rim) + CLEARANCE + height - bottom
        self._release = np.array([*container.drop, container.floor + 2 * CLEARANCE + height - bottom])
        self._sideways_error = np.inf

    def _closing_yaw(self, env: PickPlaceEnv, world_from_object: np.ndarray, others: dict[str, np.ndarray]) -> float:
        """The closing direction that turns the wrist least and keeps the hand clear of what is taller than it."""
        grasp = env.scene.objects[env.task.object].grasp
        yaw = np.arctan2(world_from_object[1, 0], world_from_object[0, 0]) + grasp.closing_yaw
        neutral = np.pi / 2
        if grasp.symmetry > 0:
            nearest = yaw + np.round((neutral - yaw) / grasp.symmetry) * grasp.symmetry
            candidates = nearest + np.array([-1, 0, 1]) * grasp.symmetry
            candidates = candidates[(np.abs(candidates - neutral) < MAX_WRIST_TURN) | (candidates == nearest)]
        else:
            candidates = neutral + np.linspace(-MAX_WRIST_TURN, MAX_WRIST_TURN, 15)
        tall = [points[:, :2] for points in others.values() if points[:, 2].max() > self._grasp[2] + HAND_ABOVE_GRIP]

        def cost(candidate: float) -> float:
            along = np.array([np.cos(candidate), np.sin(candidate)])
            axes = np.stack([along, [-along[1], along[0]]], axis=1)
            offsets = [np.abs((_outline(points) - self._grasp[:2]) @ axes) - HAND_HALF_EXTENT for points in tall]
            gap = min((np.linalg.norm(np.maximum(offset, 0), axis=1).min() for offset in offsets), default=np.inf)
            return 0.1 * abs(candidate - neutral) + 100 * max(0.0, CLEARANCE - gap)

        return min(candidates, key=cost)

    def _advance(self, env: PickPlaceEnv) -> None:
        position = env.world_from_ee[:3, 3]
        goal = self._release if self.phase in (Phase.CARRY, Phase.OPEN, Phase.RETREAT) else self._grasp
        self._sideways_error = float(np.linalg.norm(position[:2] - goal[:2]))
        self._steps += 1
        if self._steps > PHASE_LIMIT:
            self._enter(Phase.DONE)
        elif self.phase is Phase.APPROACH and self._sideways_error < 0.008 and abs(position[2] - goal[2]) < 0.01:
            self._enter(Phase.CLOSE)
        elif self.phase is Phase.CLOSE and self._steps > CLOSE_STEPS:
            self._enter(Phase.LIFT)
        elif self.phase is Phase.LIFT and position[2] > self._carry_height - 0.02:
            self._enter(Phase.CARRY)
        elif self.phase is Phase.CARRY and self._sideways_error < 0.025 and position[2] < goal[2] + 0.02:
            self._enter(Phase.OPEN)
        elif self.phase is Phase.OPEN and self._steps > OPEN_STEPS:
            self._enter(Phase.RETREAT)
        elif self.phase is Phase.RETREAT and env.success():
            self._enter(Phase.DONE)
        if self.phase in (Phase.LIFT, Phase.CARRY) and env.gripper_distance(env.task.object) > GRASP_LOST:
            self._enter(Phase.APPROACH)
            self._plan(env)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._steps = 0

    def _goal(self, env: PickPlaceEnv) -> tuple[np.ndarray, float]:
        """Position (3,) the phase moves to, and openness."""
        if self.phase is Phase.APPROACH:
            return self._over(self._grasp, self._above, slack=0.01), 1.0
        if self.phase is Phase.CLOSE:
            return self._grasp, 0.0
        if self.phase is Phase.LIFT:
            return np.array([*self._grasp[:2], self._carry_height + 0.03]), 0.0
        if self.phase is Phase.CARRY:
            return self._over(self._release, self._carry_height, slack=0.03), 0.0
        if self.phase is Phase.OPEN:
            return self._release, 1.0
        return self._release + np.array([0.0, 0.0, 0.2]), 1.0

    def _over(self, goal: np.ndarray, ceiling: float, slack: float) -> np.ndarray:
        """``goal`` raised with the sideways error, up to ``ceiling``: a funnel, which depends on no earlier step."""
        rise = FUNNEL_SLOPE * max(0.0, self._sideways_error - slack)
        return np.array([goal[0], goal[1], min(goal[2] + rise, max(ceiling, goal[2]))])


def _box_corners(env: PickPlaceEnv, name: str) -> np.ndarray:
    """Corners (8, 3) in the world of an object's bounding box."""
    low, high = env.object_box(name)
    unit = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1]), axis=-1).reshape(8, 3)
    world_from_object = env.world_from_object(name)
    return (low + unit * (high - low)) @ world_from_object[:3, :3].T + world_from_object[:3, 3]


def _outline(corners: np.ndarray) -> np.ndarray:
    """Points (N, 2) along all connections of the corners (8, 2): dense enough to measure a gap to a box."""
    steps = np.linspace(0, 1, 5)[:, None, None, None]
    return (corners[None, :, None] * (1 - steps) + corners[None, None, :] * steps).reshape(-1, 2)
