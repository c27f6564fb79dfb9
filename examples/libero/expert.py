"""A scripted expert that reads poses and shapes from the simulator: over, down, grasp, lift, across, release, up.

It picks things up and puts them on or into others, one part of the goal after the other; a part that failed is tried
again with another grasp. Its targets go through the same pose-to-action rule as a model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from examples.errors import SimulatorError
from examples.libero.bddl import Goal, Predicate, Problem
from examples.libero.rollout import EpisodeKey, Plan, Policy
from examples.libero.tasks import LiberoTask, suite_tasks

if TYPE_CHECKING:
    from examples.libero.simulator import LiberoEnv

THEN = " and then "  # between the instructions of a sequence
ATTEMPTS = 4  # at one part of the goal
HELD_BY_THE_RIM = ("bowl", "ramekin", "mug", "frypan")  # in the names of things wider than the gripper opens
PLACES = ("contain_region", "cook_region", "top_side")  # regions that a thing can be put down in from above
MAX_WIDTH = 0.075  # m, of what fits between the fingers
# The open gripper seen along its approach, half extents along and across the closing direction (m): fingers reach
# below the grip site, the hand begins above it.
FINGERS, FINGERS_BELOW = np.array([0.062, 0.014]), 0.012
HAND, HAND_ABOVE = np.array([0.105, 0.035]), 0.035
CLEARANCE = 0.03  # m: more room than this makes a grasp no better
OPEN_HAND = 0.2  # m that the hand needs between walls
SLIPPED = 0.04  # m that a thing moved in the hand: it is no longer held


@dataclass(frozen=True)
class Waypoint:
    position: np.ndarray
    """(3,) of the grip site in the world."""
    openness: float
    max_steps: int
    tolerance: float | None = None
    """m, near enough; None: it takes ``max_steps`` whatever happens."""
    free: bool = False
    """Nothing is near, so that a push does no harm."""
    grasps: bool = False
    """At its end, the thing is in the hand."""
    carries: bool = False
    """The thing must still be where it was in the hand."""


@dataclass(frozen=True)
class Grasp:
    world_from_ee: np.ndarray
    """(4, 4)."""
    cost: float


class ScriptedExpert(Policy):
    """One target at a time, from the newest state."""

    def begin(self, env: LiberoEnv, instruction: str, episode: EpisodeKey) -> None:
        self.instruct(env, instruction)

    def instruct(self, env: LiberoEnv, instruction: str) -> None:
        """It understands the instructions of the suite's tasks, as they are worded, and sequences of them."""
        goal = named_goal(env.task, instruction)
        check_goal(env.task, goal)
        self._todo = [predicate for predicate in goal if not env.holds([predicate])]
        self._attempt = 0
        self._start_part(env)

    @property
    def perturbable(self) -> bool:
        """Whether the motion is free enough to be pushed off its path."""
        return self._index < len(self._waypoints) and self._waypoints[self._index].free

    def plan(self, env: LiberoEnv) -> Plan | None:
        while self._todo:
            waypoint = self._current(env)
            if waypoint is not None:
                self._steps += 1
                pose = self._world_from_ee.copy()
                pose[:3, 3] = waypoint.position
                return Plan(pose[None], np.array([waypoint.openness]))
            if env.holds(self._todo[:1]):
                self._todo, self._attempt = self._todo[1:], 0
            else:
                self._attempt += 1
            if self._attempt == ATTEMPTS:
                return None
            self._start_part(env)
        return None

    def _current(self, env: LiberoEnv) -> Waypoint | None:
        """The waypoint to go to now; None where all were reached, or the thing was lost."""
        while self._index < len(self._waypoints):
            waypoint = self._waypoints[self._index]
            slipped = np.linalg.norm(self._in_hand(env) - self._held) if self._held is not None else 0.0
            if waypoint.carries and slipped > SLIPPED:
                return None
            distance = np.linalg.norm(waypoint.position - env.world_from_ee[:3, 3])
            near = waypoint.tolerance is not None and distance < waypoint.tolerance
            if not near and self._steps < waypoint.max_steps:
                return waypoint
            if waypoint.grasps:
                self._held = self._in_hand(env)
            self._index, self._steps = self._index + 1, 0
        return None

    def _in_hand(self, env: LiberoEnv) -> np.ndarray:
        """Where the thing is (3,), seen from the grip site."""
        return env.position(self._todo[0][1]) - env.world_from_ee[:3, 3]

    def _start_part(self, env: LiberoEnv) -> None:
        self._index = self._steps = 0
        self._held: np.ndarray | None = None
        if not self._todo:
            return
        _, thing, place = self._todo[0]
        points = env.collision_points(thing)
        low, high = points.min(axis=0), points.max(axis=0)
        centre = (low + high) / 2
        rim = _held_by_the_rim(env.task.problem, thing)
        goal = _destination(env, place)
        candidates = (rim_grasps if rim else top_grasps)(points, _others(env, thing), goal.middle)
        grasp = candidates[min(self._attempt, len(candidates) - 1)]
        self._world_from_ee = grasp.world_from_ee
        at = grasp.world_from_ee[:3, 3]
        above_bottom = at[2] - low[2]
        if rim:
            release = goal.top + above_bottom + 0.03
        else:
            release = max(goal.floor + above_bottom + 0.02, goal.top + above_bottom - 0.04)
            if goal.room < OPEN_HAND:  # between narrow walls the fingers do not open
                release = max(release, goal.top + FINGERS_BELOW + 0.01)
        across = np.array([*(goal.middle + at - centre)[:2], release])
        carry = max(goal.top + above_bottom + 0.06, at[2] + 0.10)
        here = env.world_from_ee[:3, 3]
        over = max(here[2] - 0.02, at[2] + 0.10)
        self._waypoints = (
            Waypoint(_raised(here, over), 1.0, 30, 0.04),
            Waypoint(_raised(at, over), 1.0, 60, 0.04, free=True),
            Waypoint(_raised(at, at[2] + 0.10), 1.0, 60, 0.015, free=True),
            Waypoint(_raised(at, at[2] + 0.05), 1.0, 30, 0.008),
            Waypoint(at, 1.0, 30, 0.005),
            Waypoint(at, 0.0, 14, grasps=True),
            Waypoint(_raised(at, carry), 0.0, 40, 0.03),
            Waypoint(_raised(across, carry), 0.0, 70, 0.015, free=True, carries=True),
            Waypoint(across, 0.0, 30, 0.012, carries=True),
            Waypoint(across, 1.0, 10),
            Waypoint(_raised(across, release + 0.10), 1.0, 25, 0.03),
        )


def named_goal(task: LiberoTask, instruction: str) -> Goal:
    """What an instruction asks for in the scene of ``task``: its own goal, another task's of its suite, or several
    tasks' one after the other.

    Raises ``SimulatorError`` for words that are none of these.
    """
    if instruction == task.language:
        return task.problem.goal
    goals = {other.language: other.problem.goal for other in suite_tasks(task.suite, task.benchmark) if not other.fault}
    parts = [instruction] if instruction in goals else instruction.split(THEN)
    if any(part not in goals for part in parts):
        raise SimulatorError(f"{task.suite}/{task.name}: the expert does not understand {instruction!r}")
    return tuple(dict.fromkeys(predicate for part in parts for predicate in goals[part]))


def check_goal(task: LiberoTask, goal: Goal) -> None:
    """Raises ``SimulatorError`` for a goal that takes more than picking up and putting down from above."""
    if (why := inability(task, goal)) is not None:
        raise SimulatorError(f"{task.suite}/{task.name}: {why}; leave it out")


def inability(task: LiberoTask, goal: Goal) -> str | None:
    """What of a goal takes more than that, in words; None: nothing."""
    beyond = [predicate for predicate in goal if not _can(task.problem, predicate)]
    return f"the expert cannot do {' '.join(beyond[0])}" if beyond else None


def _can(problem: Problem, predicate: Predicate) -> bool:
    if predicate[0] not in ("in", "on") or predicate[1] not in problem.objects:
        return False
    place = predicate[2]
    owner = problem.regions.get(place, place)
    return place in problem.objects or (owner != place and place.removeprefix(f"{owner}_") in PLACES)


def top_grasps(points: np.ndarray, others: np.ndarray, goal: np.ndarray) -> list[Grasp]:
    """Grasps from above of a thing of ``points`` (N, 3) across its narrow sides, the best first.

    Args:
        others: (M, 3) points of everything else.
        goal: where it will be put down; of no concern here.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    at = np.array([*(low + high)[:2] / 2, max(low[2] + 0.006, high[2] - 0.035)])
    grasps = []
    for angle in np.arange(0.0, np.pi, np.pi / 36):
        along = np.array([np.cos(angle), np.sin(angle)])
        width = np.ptp(points[:, :2] @ along)
        pose = gripper_down(at, along)
        too_wide = max(0.0, width - MAX_WIDTH)
        cost = width + 0.004 * abs(angle - np.pi / 2) + 20 * too_wide + _crowding(pose, others)
        grasps.append(Grasp(pose, cost))
    return _distinct(grasps)


def rim_grasps(points: np.ndarray, others: np.ndarray, goal: np.ndarray) -> list[Grasp]:
    """Grasps from above of the rim of a round thing of ``points`` (N, 3), the best first: one finger inside, the
    other outside, on the side that turns the wrist least and is away from ``goal`` (3,)."""
    low, high = points.min(axis=0), points.max(axis=0)
    centre = (low + high)[:2] / 2
    radius = np.linalg.norm(points[points[:, 2] > high[2] - 0.01][:, :2] - centre, axis=1).mean()
    grasps = []
    for angle in np.arange(-np.pi, np.pi, np.pi / 12):
        outward = np.array([np.cos(angle), np.sin(angle)])
        pose = gripper_down(np.array([*(centre + radius * outward), high[2] - 0.018]), outward)
        towards_goal = outward @ (goal[:2] - centre) > 0
        grasps.append(Grasp(pose, 0.02 * abs(np.cos(angle)) + 0.004 * towards_goal + _crowding(pose, others)))
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


def _crowding(world_from_ee: np.ndarray, others: np.ndarray) -> float:
    """How much of ``CLEARANCE`` a gripper that comes straight down to a pose lacks (m), where it weighs most."""
    if not len(others):
        return 0.0
    local = (others - world_from_ee[:3, 3]) @ world_from_ee[:3, :3]  # z down
    gaps = []
    for extent, lowest in ((FINGERS, FINGERS_BELOW), (HAND, -HAND_ABOVE)):
        beside = np.maximum(np.abs(local[local[:, 2] < lowest][:, :2]) - extent, 0.0)
        gaps.append(np.linalg.norm(beside, axis=1).min(initial=CLEARANCE))
    return CLEARANCE - min(gaps)


def _distinct(grasps: list[Grasp]) -> list[Grasp]:
    """The best first; then each as different from those before as it is good, for when they failed."""
    left = sorted(grasps, key=lambda grasp: grasp.cost)
    chosen = [left.pop(0)]
    while left and len(chosen) < ATTEMPTS:
        left = [grasp for grasp in left if min(_angle(grasp, other) for other in chosen) > np.pi / 7] or left
        chosen.append(left.pop(0))
    return chosen


def _angle(one: Grasp, other: Grasp) -> float:
    """Between two grasps: how far the hand turns or moves round, whichever is plainer (rad)."""
    turn = np.arccos(np.clip(one.world_from_ee[:3, 0] @ other.world_from_ee[:3, 0], -1.0, 1.0))
    moved = np.linalg.norm(one.world_from_ee[:3, 3] - other.world_from_ee[:3, 3])
    return max(turn, moved / 0.05)


def _held_by_the_rim(problem: Problem, thing: str) -> bool:
    return any(word in problem.objects[thing] for word in HELD_BY_THE_RIM)


@dataclass(frozen=True)
class Destination:
    middle: np.ndarray
    """(3,) in the world."""
    floor: float
    top: float
    """Lowest and highest point there (m)."""
    room: float
    """Its narrower side (m)."""


def _destination(env: LiberoEnv, place: str) -> Destination:
    """Where to put a thing."""
    problem = env.task.problem
    owner = problem.regions.get(place, place)
    points = env.collision_points(owner)
    low, high = points.min(axis=0), points.max(axis=0)
    room = float((high - low)[:2].min())
    if owner in problem.objects:
        return Destination((low + high) / 2, low[2], high[2], room)
    middle = env.region_position(place)
    below = points[np.linalg.norm(points[:, :2] - middle[:2], axis=1) < 0.06]
    top = below[:, 2].max(initial=middle[2])
    return Destination(middle, top, top, room)


def _others(env: LiberoEnv, thing: str) -> np.ndarray:
    """Points (N, 3) of everything that stands near ``thing``."""
    problem = env.task.problem
    names = [name for name in (*problem.objects, *problem.fixtures) if name != thing and "table" not in name]
    points = np.concatenate([np.zeros((0, 3)), *(env.collision_points(name) for name in names if name != "floor")])
    middle = env.collision_points(thing)[:, :2].mean(axis=0)
    return points[np.linalg.norm(points[:, :2] - middle, axis=1) < 0.25]


def _raised(position: np.ndarray, height: float) -> np.ndarray:
    return np.array([position[0], position[1], height])
