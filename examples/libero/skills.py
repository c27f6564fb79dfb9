"""What the arm can do, each skill as waypoints from how things stand now: pick and place, open, close, turn, slide.

A skill looks at the scene once, when it begins, and is followed to its end without looking again; whoever follows it
checks what it came to and begins again. ``attempt`` counts these, so that what failed is tried in another way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation

from examples.libero.bddl import Problem
from examples.libero.grasps import FINGERS_BELOW, gripper_down, gripper_towards, rim_grasps, top_grasps

if TYPE_CHECKING:
    from examples.libero.simulator import Joint, LiberoEnv

HELD_BY_THE_RIM = ("bowl", "ramekin", "mug", "frypan")  # in the names of things wider than the gripper opens
OPEN_HAND = 0.2  # m that the hand needs between walls
FRONT = 0.045  # m of a drawer's front with its handle
COMPARTMENTS = ("back_contain_region", "front_contain_region", "left_contain_region", "right_contain_region")
SHARED = 0.67  # of a place's half extent: how far from its middle the outer ones of several things go
OVERHANG_MARGIN = 0.02  # m
HANDLE_DEPTH = 0.017  # m of a drawer's outermost parts that are its handle
KNOB_HEIGHT = 0.02  # m of a knob's uppermost parts that are its ridge
TILTS = np.radians([20.0, 8.0, 32.0, 0.0])  # of the gripper below the level, in front of a drawer
SIDEWAYS = np.radians([0.0, 40.0, -40.0, 80.0])  # of the edge that is held from where a thing is drawn to
GENTLE = 0.025  # m in a control step with a thing that swings, held by its rim
CLOSE_STEPS = 14
UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Waypoint:
    world_from_ee: np.ndarray
    """(4, 4) of the grip site."""
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
    stride: float = np.inf
    """m at most in a control step."""


Waypoints = tuple[Waypoint, ...]


def pick_and_place(env: LiberoEnv, thing: str, place: str, attempt: int) -> Waypoints:
    """Grasp ``thing`` from above, carry it over ``place``, put it down there."""
    points = env.collision_points(thing)
    low, high = points.min(axis=0), points.max(axis=0)
    centre = (low + high) / 2
    rim = any(word in env.task.problem.objects[thing] for word in HELD_BY_THE_RIM)
    goal = _destination(env, place)
    goal = replace(goal, middle=goal.middle + _share(env, thing, place, high - low))
    others = _others(env, thing)
    candidates = (rim_grasps if rim else top_grasps)(points, others, goal.middle, goal.narrow)
    pose = candidates[min(attempt, len(candidates) - 1)].world_from_ee
    at = pose[:3, 3]
    above_bottom = at[2] - low[2]
    if rim:
        release = goal.top + above_bottom + goal.drop
    else:
        release = max(goal.floor + above_bottom + 0.02, goal.top + above_bottom - 0.04)
        if goal.room < OPEN_HAND:  # between narrow walls the fingers do not open
            release = max(release, goal.top + FINGERS_BELOW + 0.01)
    across = _at(pose, np.array([*(goal.middle + at - centre)[:2], release]))
    if goal.fit is not None:
        across = _turned_to(across, goal.fit)
    carry = max(goal.top + above_bottom + 0.06, at[2] + 0.10, goal.walls + above_bottom + 0.06)
    off = _out_from_under(points, others)
    aside = (_raised(pose, at[2] + 0.03), _moved(pose, off + 0.03 * UP)) if off.any() else ()
    here = env.world_from_ee[:3, 3]
    over = max(here[2] - 0.02, at[2] + 0.10)
    stride = GENTLE if rim else np.inf
    return (
        Waypoint(_raised(_at(pose, here), over), 1.0, 30, 0.04),
        Waypoint(_raised(pose, over), 1.0, 60, 0.04, free=True),
        Waypoint(_raised(pose, at[2] + 0.10), 1.0, 60, 0.015, free=True),
        Waypoint(_raised(pose, at[2] + 0.05), 1.0, 30, 0.008),
        Waypoint(pose, 1.0, 30, 0.005),
        Waypoint(pose, 0.0, CLOSE_STEPS, grasps=True),
        *(Waypoint(step, 0.0, 40, 0.015, stride=stride) for step in aside),
        Waypoint(_raised(aside[-1] if aside else pose, carry), 0.0, 60, 0.03, stride=stride),
        Waypoint(_raised(across, carry), 0.0, 90, goal.within, free=True, carries=True, stride=stride),
        Waypoint(across, 0.0, 40, goal.within, carries=True, stride=stride),
        Waypoint(across, 1.0, 10),
        Waypoint(_raised(across, release + 0.10), 1.0, 25, 0.03),
    )


def open_drawer(env: LiberoEnv, drawer: str, attempt: int) -> Waypoints:
    """Grasp the handle from the front, across it, and draw it out."""
    joint = env.joint(drawer, "open")
    out = joint.axis * np.sign(joint.missing)
    tilt = TILTS[attempt % len(TILTS)]
    approach = -np.cos(tilt) * out - np.sin(tilt) * UP
    across = np.cross(approach, np.cross(out, UP))
    pose = gripper_towards(_handle(joint, out), approach, across, env.world_from_ee)
    before, drawn = _moved(pose, -0.10 * approach), _moved(pose, out * (abs(joint.missing) + 0.005))
    return (
        *_come_to(env, before, 1.0),
        Waypoint(pose, 1.0, 40, 0.006),
        Waypoint(pose, 0.0, CLOSE_STEPS),
        Waypoint(drawn, 0.0, 60, 0.006),
        Waypoint(drawn, 1.0, 8),
        *_leave(_moved(drawn, 0.10 * out)),
        _upright(drawn),
    )


def close_drawer(env: LiberoEnv, drawer: str, attempt: int) -> Waypoints:
    """Push it shut by its handle, the gripper closed and tilted away from the front."""
    joint = env.joint(drawer, "close")
    inward = joint.axis * np.sign(joint.missing)
    tilt = np.radians(50.0) - TILTS[attempt % len(TILTS)]
    approach = np.sin(tilt) * inward - np.cos(tilt) * UP
    handle = _handle(joint, -inward)
    touching = gripper_towards(handle - 0.012 * inward, approach, np.cross(inward, UP), env.world_from_ee)
    shut = _moved(touching, inward * (abs(joint.missing) + 0.015))
    return (
        *_come_to(env, _moved(touching, -0.07 * inward), 0.0),
        Waypoint(touching, 0.0, 30, 0.01),
        Waypoint(shut, 0.0, 60, 0.004),
        *_leave(_moved(touching, -0.07 * inward), 0.0),
        _upright(touching),
    )


def turn_knob(env: LiberoEnv, knob: str, change: str, attempt: int) -> Waypoints:
    """Grasp its ridge from above and turn the wrist."""
    joint = env.joint(knob, change)
    ridge = joint.points[joint.points[:, 2] > joint.points[:, 2].max() - KNOB_HEIGHT]
    grasps = top_grasps(ridge, np.zeros((0, 3)), ridge.mean(axis=0))
    pose = gripper_down(
        np.array([*grasps[0].world_from_ee[:2, 3], ridge[:, 2].max() - 0.018]), grasps[0].world_from_ee[:2, 0]
    )
    turned = [_turned(pose, joint, share * joint.missing) for share in np.linspace(0.0, 1.0, 5)[1:]]
    return (
        *_come_to(env, _raised(pose, pose[2, 3] + 0.10), 1.0),
        Waypoint(pose, 1.0, 40, 0.005),
        Waypoint(pose, 0.0, CLOSE_STEPS),
        *(Waypoint(step, 0.0, 10) for step in turned),
        Waypoint(turned[-1], 1.0, 8),
        *_leave(turned[-1]),
    )


def slide(env: LiberoEnv, thing: str, place: str, attempt: int) -> Waypoints:
    """Hold ``thing`` by the edge that is nearest to ``place`` and draw it over the table."""
    points = env.collision_points(thing)
    low, high = points.min(axis=0), points.max(axis=0)
    middle, goal = (low + high) / 2, env.region_position(place)
    along = np.array([*(goal - middle)[:2], 0.0])
    distance = np.linalg.norm(along)
    along = Rotation.from_euler("z", SIDEWAYS[attempt % len(SIDEWAYS)]).apply(along / distance)
    edge = middle + along * ((points - middle) @ along).max()
    pose = gripper_down(np.array([*edge[:2], low[2] + FINGERS_BELOW + 0.003]), along[:2])
    end = _moved(pose, np.array([*(goal - middle)[:2], 0.004]))
    return (
        *_come_to(env, _raised(pose, high[2] + 0.08), 1.0),
        Waypoint(pose, 1.0, 40, 0.006),
        Waypoint(pose, 0.0, CLOSE_STEPS),
        Waypoint(end, 0.0, 100, 0.01),
        Waypoint(end, 1.0, 8),
        *_leave(end),
    )


def let_go(env: LiberoEnv) -> Waypoints:
    """Open the hand and rise; what was held comes to rest."""
    here = env.world_from_ee
    return (Waypoint(here, 1.0, 6), Waypoint(_raised(here, here[2, 3] + 0.10), 1.0, 20, 0.03))


# -- parts of paths ---------------------------------------------------------------------------------------------------


def _come_to(env: LiberoEnv, pose: np.ndarray, openness: float) -> Waypoints:
    """Up, across and turned, down to ``pose`` from wherever the arm is."""
    here = env.world_from_ee[:3, 3]
    over = max(here[2], pose[2, 3] + 0.12)
    return (
        Waypoint(_raised(env.world_from_ee, over), openness, 30, 0.03),
        Waypoint(_raised(pose, over), openness, 70, 0.03, free=True),
        Waypoint(pose, openness, 60, 0.012),
    )


def _leave(pose: np.ndarray, openness: float = 1.0) -> Waypoints:
    return (
        Waypoint(pose, openness, 25, 0.02),
        Waypoint(_raised(pose, pose[2, 3] + 0.15), openness, 25, 0.03),
    )


def _upright(pose: np.ndarray) -> Waypoint:
    """High above, as the arm hangs by itself: from a tilted hand straight to another grasp, joints meet their ends."""
    high = np.array([*pose[:2, 3], pose[2, 3] + 0.15])
    return Waypoint(gripper_down(high, np.array([0.0, 1.0])), 1.0, 50, 0.05)


def _handle(joint: Joint, out: np.ndarray) -> np.ndarray:
    """Middle (3,) of a drawer's outermost parts."""
    reach = joint.points @ out
    outermost = joint.points[reach > reach.max() - HANDLE_DEPTH]
    return (outermost.min(axis=0) + outermost.max(axis=0)) / 2


def _turned_to(pose: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Turned about the vertical, by a quarter at most, until it closes along ``direction`` (2,)."""
    now, wanted = np.arctan2(pose[1, 0], pose[0, 0]), np.arctan2(direction[1], direction[0])
    angle = (wanted - now + np.pi / 2) % np.pi - np.pi / 2
    turned = pose.copy()
    turned[:3, :3] = Rotation.from_euler("z", angle).as_matrix() @ pose[:3, :3]
    return turned


def _turned(pose: np.ndarray, joint: Joint, angle: float) -> np.ndarray:
    turn = Rotation.from_rotvec(angle * joint.axis).as_matrix()
    turned = pose.copy()
    turned[:3, :3] = turn @ pose[:3, :3]
    turned[:3, 3] = joint.anchor + turn @ (pose[:3, 3] - joint.anchor)
    return turned


def _moved(pose: np.ndarray, offset: np.ndarray) -> np.ndarray:
    return _at(pose, pose[:3, 3] + offset)


def _at(pose: np.ndarray, position: np.ndarray) -> np.ndarray:
    moved = pose.copy()
    moved[:3, 3] = position
    return moved


def _raised(pose: np.ndarray, height: float) -> np.ndarray:
    return _at(pose, np.array([*pose[:2, 3], height]))


# -- the scene --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Destination:
    """Where to put a thing down."""

    middle: np.ndarray
    """(3,) in the world."""
    floor: float
    top: float
    """Lowest and highest point there (m)."""
    room: float
    """Its narrower side (m)."""
    walls: float
    """Height of what is to be carried over on the way (m)."""
    within: float = 0.015
    """m, how near the hand must come before it goes down, and lets go."""
    drop: float = 0.03
    """m above ``top`` from which a thing that was held by its rim is let fall: it hangs askew."""
    narrow: np.ndarray | None = None
    """(2,) direction in which the hand has no room beside the thing."""
    fit: np.ndarray | None = None
    """(2,) direction in which the thing, which its narrow side faces, has just room enough."""


def _destination(env: LiberoEnv, place: str) -> Destination:
    problem = env.task.problem
    owner = problem.regions.get(place, place)
    if is_drawer(problem, place):
        joint = env.joint(place, "close")
        middle, out = env.region_position(place), -joint.axis * np.sign(joint.missing)
        # What the cabinet does not cover: it ends where the front does, drawn out by so much.
        front = ((joint.points - middle) @ out).max() - FRONT
        middle = middle + out * (front - abs(joint.missing) / 2)
        inside = joint.points[np.linalg.norm(joint.points[:, :2] - middle[:2], axis=1) < 0.04]
        floor, walls = inside[:, 2].min(), joint.points[:, 2].max()
        return Destination(middle, floor, floor, OPEN_HAND, walls, 0.005, 0.02, joint.axis[:2])
    if is_table(problem, owner):
        middle = env.region_position(place)
        return Destination(middle, middle[2], middle[2], OPEN_HAND, middle[2])
    points = env.collision_points(owner)
    low, high = points.min(axis=0), points.max(axis=0)
    room = float((high - low)[:2].min())
    if owner in problem.objects:
        return Destination((low + high) / 2, low[2], high[2], room, high[2])
    middle = env.region_position(place)
    if place.removeprefix(f"{owner}_") in COMPARTMENTS:
        half = env.region_extent(place)
        inside = (np.abs(points - middle)[:, :2] < half[:2] + 0.02).all(axis=1)
        top = points[inside][:, 2].max(initial=middle[2])
        fit = np.eye(2)[half[:2].argmin()]
        return Destination(middle, middle[2] - half[2], top, 2 * half[:2].min(), top, 0.006, fit=fit)
    below = points[np.linalg.norm(points[:, :2] - middle[:2], axis=1) < 0.06]
    top = below[:, 2].max(initial=middle[2])
    return Destination(middle, top, top, room, top)


def _out_from_under(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How far (3,) a thing of ``points`` must go to the side before it is free of what juts out above it."""
    centre, high = points[:, :2].mean(axis=0), points[:, 2].max()
    reach = np.linalg.norm(points[:, :2] - centre, axis=1).max() + OVERHANG_MARGIN
    above = others[others[:, 2] > high + 0.01][:, :2] - centre
    above = above[np.linalg.norm(above, axis=1) < reach]
    if not len(above):
        return np.zeros(3)
    away = -above.mean(axis=0) / np.linalg.norm(above.mean(axis=0))
    return np.array([*away * (reach + (above @ away).max()), 0.0])


def _share(env: LiberoEnv, thing: str, place: str, size: np.ndarray) -> np.ndarray:
    """How far (3,) from the middle of a place that several things are to stand on, side by side by their narrow sides,
    ``thing`` of ``size`` (3,) goes."""
    problem = env.task.problem
    there = [what for change, what, *where in problem.goal if change == "on" and where == [place]]
    offset = np.zeros(3)
    if len(there) > 1 and thing in there and place in problem.regions:
        axis = int(size[:2].argmin())
        room = env.region_extent(place)[axis]
        offset[axis] = np.linspace(-SHARED * room, SHARED * room, len(there))[there.index(thing)]
    return offset


def is_drawer(problem: Problem, place: str) -> bool:
    """Whether ``place`` is the inside of a cabinet's drawer."""
    owner = problem.regions.get(place, place)
    return "cabinet" in problem.fixtures.get(owner, "") and place.endswith("_region")


def is_table(problem: Problem, owner: str) -> bool:
    return "table" in problem.fixtures.get(owner, "")


def _others(env: LiberoEnv, thing: str) -> np.ndarray:
    """Points (N, 3) of everything that stands near ``thing``."""
    problem = env.task.problem
    names = [name for name in (*problem.objects, *problem.fixtures) if name != thing and "table" not in name]
    points = np.concatenate([np.zeros((0, 3)), *(env.collision_points(name) for name in names if name != "floor")])
    middle = env.collision_points(thing)[:, :2].mean(axis=0)
    return points[np.linalg.norm(points[:, :2] - middle, axis=1) < 0.25]
