"""A scripted expert that reads poses and shapes from the simulator: which skill makes which part of a goal hold.

One part of the goal after the other; a part that failed is tried again in another way. Its targets go through the same
pose-to-action rule as a model's.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from examples.errors import SimulatorError
from examples.libero import skills
from examples.libero.bddl import Goal, Predicate, Problem
from examples.libero.rollout import EpisodeKey, Plan, Policy
from examples.libero.skills import COMPARTMENTS, Waypoint, is_drawer, is_table
from examples.libero.tasks import LiberoTask, suite_tasks

if TYPE_CHECKING:
    from examples.libero.simulator import LiberoEnv

THEN = " and then "  # between the instructions of a sequence
ATTEMPTS = 4  # at one part of the goal
PLACES = ("contain_region", "cook_region", "top_side", "top_region", *COMPARTMENTS)  # put down in from above
SLIPPED = 0.08  # m that a thing moved in the hand: it is no longer held
TURNED = np.cos(0.15)  # of the angle (rad) to a waypoint's orientation that is near enough


class ScriptedExpert(Policy):
    """One target at a time, from the newest state."""

    def begin(self, env: LiberoEnv, instruction: str, episode: EpisodeKey) -> None:
        self.instruct(env, instruction)

    def instruct(self, env: LiberoEnv, instruction: str) -> None:
        """It understands the instructions of the suite's tasks, as they are worded, and sequences of them."""
        goal = named_goal(env.task, instruction)
        check_goal(env.task, goal)
        self._goal = goal
        self._failures: Counter[Predicate] = Counter()
        self._take_up(env)

    @property
    def perturbable(self) -> bool:
        """Whether the motion is free enough to be pushed off its path."""
        return self._index < len(self._waypoints) and self._waypoints[self._index].free

    def plan(self, env: LiberoEnv) -> Plan | None:
        while self._part is not None:
            waypoint = self._current(env)
            if waypoint is not None:
                self._steps += 1
                return Plan(_target(waypoint, env.world_from_ee)[None], np.array([waypoint.openness]))
            if self._recovering or env.holds([self._part]):
                self._take_up(env)
                continue
            self._failures[self._part] += 1
            if self._failures[self._part] == ATTEMPTS:
                return None
            self._follow(skills.let_go(env), recovering=True)
        return None

    def _current(self, env: LiberoEnv) -> Waypoint | None:
        """The waypoint to go to now; None where all were reached, or the thing was lost."""
        while self._index < len(self._waypoints):
            waypoint = self._waypoints[self._index]
            slipped = np.linalg.norm(self._in_hand(env) - self._held) if self._held is not None else 0.0
            if waypoint.carries and slipped > SLIPPED:
                return None
            distance = np.linalg.norm(waypoint.world_from_ee[:3, 3] - env.world_from_ee[:3, 3])
            cosine = (np.trace(waypoint.world_from_ee[:3, :3].T @ env.world_from_ee[:3, :3]) - 1) / 2
            near = waypoint.tolerance is not None and distance < waypoint.tolerance and cosine > TURNED
            if not near and self._steps < waypoint.max_steps:
                return waypoint
            if waypoint.grasps:
                self._held = self._in_hand(env)
            self._index, self._steps = self._index + 1, 0
        return None

    def _in_hand(self, env: LiberoEnv) -> np.ndarray:
        """Where the thing is (3,), seen from the grip site."""
        return env.position(self._part[1]) - env.world_from_ee[:3, 3]

    def _take_up(self, env: LiberoEnv) -> None:
        """Begin with the first part of the goal that is missing now."""
        self._part = next(iter(missing_parts(env, self._goal)), None)
        self._follow(() if self._part is None else skill_path(env, self._part, self._failures[self._part]))

    def _follow(self, path: skills.Waypoints, recovering: bool = False) -> None:
        self._waypoints, self._recovering = path, recovering
        self._index = self._steps = 0
        self._held: np.ndarray | None = None


def _target(waypoint: Waypoint, world_from_ee: np.ndarray) -> np.ndarray:
    """Pose (4, 4) to ask for now."""
    pose = waypoint.world_from_ee.copy()
    way = pose[:3, 3] - world_from_ee[:3, 3]
    pose[:3, 3] = world_from_ee[:3, 3] + way * min(1.0, waypoint.stride / max(np.linalg.norm(way), 1e-9))
    return pose


def skill_path(env: LiberoEnv, predicate: Predicate, attempt: int) -> skills.Waypoints:
    """The skill that makes ``predicate`` hold."""
    change, part, *places = predicate
    if change == "open":
        return skills.open_drawer(env, part, attempt)
    if change == "close":
        return skills.close_drawer(env, part, attempt)
    if change == "turnon":
        return skills.turn_knob(env, part, change, attempt)
    if _slides(env.task.problem, predicate):
        return skills.slide(env, part, places[0], attempt)
    return skills.pick_and_place(env, part, places[0], attempt)


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
    """Raises ``SimulatorError`` for a goal that takes more than there are skills for."""
    if (why := inability(task, goal)) is not None:
        raise SimulatorError(f"{task.suite}/{task.name}: {why}; leave it out")


def inability(task: LiberoTask, goal: Goal) -> str | None:
    """What of a goal takes more than that, in words; None: nothing."""
    beyond = [predicate for predicate in goal if not _can(task.problem, predicate)]
    return f"the expert cannot do {' '.join(beyond[0])}" if beyond else None


def _can(problem: Problem, predicate: Predicate) -> bool:
    change, part, *places = predicate
    if change in ("open", "close"):
        return is_drawer(problem, part)
    if change == "turnon":
        return "stove" in problem.fixtures.get(part, "")
    if change not in ("in", "on") or part not in problem.objects:
        return False
    place = places[0]
    owner = problem.regions.get(place, place)
    if place in problem.objects or is_drawer(problem, place):
        return True
    return owner != place and (is_table(problem, owner) or place.removeprefix(f"{owner}_") in PLACES)


def _slides(problem: Problem, predicate: Predicate) -> bool:
    """Whether a thing is too flat to be picked up, and goes over the table."""
    _, thing, place = predicate
    return "plate" in problem.objects[thing] and is_table(problem, problem.regions.get(place, place))


def missing_parts(env: LiberoEnv, goal: Goal) -> list[Predicate]:
    """What is to be done for ``goal``, one after the other, as things are: drawers are opened before something is put
    in, and closed after that."""
    todo: list[Predicate] = []
    for predicate in sorted(goal, key=lambda predicate: predicate[0] == "close"):
        if env.holds([predicate]):
            continue
        if predicate[0] == "in" and is_drawer(env.task.problem, predicate[2]):
            opened = ("open", predicate[2])
            if not env.holds([opened]):
                todo.append(opened)
        todo.append(predicate)
    return todo
