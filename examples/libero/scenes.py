"""Renders scenes of LIBERO's suites with the names and places of what they show, to teach a vision-language model.

    python -m examples.libero.scenes --suites libero_object --out data/libero_scenes --scenes 20250 --workers 2

The suites' tasks put each thing nearly always in one place, so that the place tells what it is. Here things that stand
free lie anywhere in the part of the table, or floor, that the task uses, the arm is anywhere above it, and sometimes
something is between its fingers. A thing is called as the suite's instructions call it. Written in parts
(``apt.grounding.scenes``), each from its own seed; stopped, the same command goes on.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from apt.grounding.scenes import Place, SetDescription, Thing, write_part
from data_utils.cli import CommandLineError, check_writable, parse
from data_utils.geometry.camera import project
from examples.errors import SimulatorError
from examples.libero import environment
from examples.libero.tasks import LiberoTask, suite_tasks
from examples.scene_parts import PER_PART, SCENES_STREAM, render_parts

if TYPE_CHECKING:
    from examples.libero.simulator import LiberoEnv

COMMAND = "examples.libero.scenes"
SENTENCES = (
    "pick up the {object} and place it in the {container}",
    "pick up the {object} and put it in the {container}",
    "put the {object} in the {container}",
    "place the {object} on the {container}",
    "grab the {object} and drop it into the {container}",
    "take the {object} and place it inside the {container}",
    "move the {object} to the {container}",
    "pick up the {object}",
)
CAMERAS = ("agentview", "eye_in_hand")
GROUND = frozenset(("floor", "table", "kitchen_table", "living_room_table", "study_table", "coffee_table"))
TASKS_AT_ONCE = 10  # simulators that a process keeps, and tasks that a part is of
AS_DRAWN = 0.2  # share of the scenes in which things lie as the task puts them
DRAWS = 5  # of the task's placements, before where things may lie is taken from them
AT_HOME = 0.3  # share of the scenes with the arm where episodes begin
HELD = 0.25  # share of the others in which something is between the fingers
ROOM = 0.05  # m that the places where things may lie reach beyond those of the suite
APART = 0.01  # m between things
JOINT_SPREAD = np.array([0.5, 0.4, 0.4, 0.4, 0.3, 0.4, 0.8])  # rad about home, standard deviations
HEIGHTS = (0.02, 0.35)  # m of the grip site above what things stand on
LEAST_DOWN = 0.85  # cosine between the gripper's direction and straight down
TRIES = 200


@dataclass(frozen=True)
class ScenesConfig:
    out: Path
    """Folder for the parts."""
    suites: tuple[str, ...] = ("libero_object",)
    """Of LIBERO."""
    scenes: int = 20250
    """How many; whole parts of 250 are made."""
    seed: int = 0
    workers: int = 2
    """Processes; up to ten simulators each."""
    image_size: int = 128

    def __post_init__(self) -> None:
        for name in ("scenes", "workers", "image_size"):
            if getattr(self, name) < 1:
                raise CommandLineError(f"--{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Naming:
    """What the kinds of things of some tasks are called, and which of them others are put into or onto."""

    names: Mapping[str, str]
    containers: frozenset[str]

    @classmethod
    def of(cls, tasks: Sequence[LiberoTask]) -> Naming:
        """As the instructions have it: of ``akita_black_bowl`` the longest end that one of them says, ``black bowl``.

        What no instruction speaks of is called by its whole kind.
        """
        problems = [task.problem for task in tasks]
        said = [f" {task.language.lower()} " for task in tasks]
        names, containers = {}, set()
        for problem in problems:
            things = {**problem.objects, **problem.fixtures}
            for kind in things.values():
                words = kind.split("_")
                ends = [" ".join(words[first:]) for first in range(len(words))]
                names[kind] = next((end for end in ends if any(f" {end} " in text for text in said)), ends[0])
            for predicate, *arguments in problem.goal:
                if predicate in ("in", "on"):
                    place = problem.regions.get(arguments[1], arguments[1])
                    containers.add(things[place])
        return cls(names, frozenset(containers))


class Stage:
    """One task's scene, in which things are put about."""

    def __init__(self, env: LiberoEnv, naming: Naming) -> None:
        self.env, self._naming = env, naming
        problem = env.task.problem
        ground = [name for name, kind in problem.fixtures.items() if kind in GROUND]
        self._free = [
            thing
            for predicate, thing, *places in problem.init
            if predicate == "on" and thing in problem.objects and problem.regions.get(places[0]) in ground
        ]
        self._others = [name for name in (*problem.objects, *problem.fixtures) if name not in (*self._free, *ground)]
        kinds = {**problem.objects, **problem.fixtures}
        names = {thing: naming.names[kind] for thing, kind in kinds.items() if thing not in ground}
        # Of two bowls neither is the bowl.
        self._named = {thing: name for thing, name in names.items() if list(names.values()).count(name) == 1}
        if not self._free:
            raise SimulatorError(f"{env.task.name}: nothing stands free in its scene")
        self._low, self._high = np.full(2, np.inf), np.full(2, -np.inf)
        rng = np.random.default_rng(0)
        for _ in range(DRAWS):
            self._draw(rng)

    def scenes(self, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, list[Thing]]]:
        """Images (Ncam, H, W, 3) and what they show, for ever."""
        while True:
            if rng.random() < AS_DRAWN:
                self._draw(rng)
            else:
                self.env.set_state(self._drawn)
                self._scatter(rng)
            if rng.random() >= AT_HOME:
                self._move_arm(rng)
                if rng.random() < HELD:
                    self._hold(rng)
            yield np.stack([self.env.rgb(camera) for camera in self.env.cameras]), self._things()

    def _draw(self, rng: np.random.Generator) -> None:
        """As the task puts everything, which may widen the rectangle that its placements span."""
        self.env.reset(int(rng.integers(2**31)))
        self._drawn = self.env.state
        places = np.array([_disc(self.env.collision_points(thing))[0] for thing in self._free])
        self._low = np.minimum(self._low, places.min(axis=0))
        self._high = np.maximum(self._high, places.max(axis=0))

    def _scatter(self, rng: np.random.Generator) -> None:
        """Put what stands free anywhere in that rectangle and a little beyond."""
        taken = [_disc(points) for name in self._others if len(points := self.env.collision_points(name))]
        for thing in rng.permutation(self._free):
            frame = self.env.position(thing)
            self.env.set_thing(thing, frame, rng.uniform(-np.pi, np.pi))
            centre, radius = _disc(self.env.collision_points(thing))
            for _ in range(TRIES):
                at = rng.uniform(self._low - ROOM, self._high + ROOM)
                if all(np.linalg.norm(at - other) > radius + room + APART for other, room in taken):
                    self.env.set_thing(thing, frame + [*(at - centre), 0.0])
                    taken.append((at, radius))
                    break
            else:
                taken.append((centre, radius))  # no room anywhere: it stays

    def _move_arm(self, rng: np.random.Generator) -> None:
        """Put the gripper anywhere above that rectangle, pointing down, open or not; home where none is found."""
        low, high = self._low - 2 * ROOM, self._high + 2 * ROOM
        ground = min(self.env.collision_points(thing)[:, 2].min() for thing in self._free)
        for _ in range(TRIES):
            self.env.set_arm(self.env.home + JOINT_SPREAD * rng.standard_normal(7), float(rng.random() ** 0.5))
            pose = self.env.world_from_ee
            inside = (low <= pose[:2, 3]).all() and (pose[:2, 3] <= high).all()
            if inside and HEIGHTS[0] <= pose[2, 3] - ground <= HEIGHTS[1] and -pose[2, 2] >= LEAST_DOWN:
                return
        self.env.set_arm(self.env.home, 1.0)

    def _hold(self, rng: np.random.Generator) -> None:
        """Put something that stands free between the fingers."""
        thing = str(rng.choice(self._free))
        points, site = self.env.collision_points(thing), self.env.world_from_ee[:3, 3]
        middle = (points.min(axis=0) + points.max(axis=0)) / 2
        below = rng.uniform(0.0, 0.5) * np.ptp(points[:, 2])
        self.env.set_thing(thing, self.env.position(thing) + site - middle - [0.0, 0.0, below])

    def _things(self) -> list[Thing]:
        kinds = {**self.env.task.problem.objects, **self.env.task.problem.fixtures}
        found = []
        for thing, name in self._named.items():
            points = self.env.collision_points(thing)
            centre = (points.min(axis=0) + points.max(axis=0)) / 2 if len(points) else self.env.position(thing)
            kind = "container" if kinds[thing] in self._naming.containers else "object"
            found.append(Thing(name, kind, tuple(self._place(camera, centre) for camera in self.env.cameras)))
        return sorted(found, key=lambda thing: thing.kind, reverse=True)  # objects before what they lie in

    def _place(self, camera: str, position: np.ndarray) -> Place:
        pixel, in_front = project(position, self.env.intrinsics(camera), self.env.world_from_cam(camera))
        u, v = pixel / self.env.image_size
        return (float(u), float(v)) if in_front and 0 <= u < 1 and 0 <= v < 1 else None


def _disc(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre (2,) and radius of a circle, seen from above, around points (N, 3)."""
    flat = points[:, :2]
    centre = (flat.min(axis=0) + flat.max(axis=0)) / 2
    return centre, float(np.linalg.norm(flat - centre, axis=1).max())


def usable_tasks(suites: Sequence[str]) -> list[LiberoTask]:
    """Tasks of these suites whose files are whole. Raises ``SimulatorError`` for an unknown suite."""
    return [task for suite in suites for task in suite_tasks(suite) if task.fault is None]


def render(config: ScenesConfig) -> None:
    """Make the parts that are missing. Raises ``SimulatorError``."""
    environment.check_assets()
    usable_tasks(config.suites)  # complains here rather than in a worker
    render_parts(config.out, config.scenes, config.workers, functools.partial(_render_part, config))


def _render_part(config: ScenesConfig, number: int) -> None:
    tasks = usable_tasks(config.suites)
    rng = np.random.default_rng([config.seed, number, SCENES_STREAM])
    chosen = rng.permutation(len(tasks))[:TASKS_AT_ONCE]
    stages = [_stage(tasks[index], tuple(config.suites), config.image_size).scenes(rng) for index in sorted(chosen)]
    description = SetDescription(CAMERAS, config.image_size, SENTENCES)
    write_part(config.out, number, description, PER_PART, (next(stage) for stage in itertools.cycle(stages)))


@functools.lru_cache(maxsize=TASKS_AT_ONCE)  # a simulator takes seconds to build
def _stage(task: LiberoTask, suites: tuple[str, ...], image_size: int) -> Stage:
    simulator = environment.import_simulator(task.benchmark)
    return Stage(simulator.LiberoEnv(task, image_size), Naming.of(suite_tasks(task.suite)))


def main(argv: Sequence[str]) -> int:
    try:
        config = parse(ScenesConfig, argv, f"python -m {COMMAND}", "Render labelled scenes of LIBERO's suites.")
        environment.enter_libero(COMMAND)
        check_writable(config.out, "--out")
        render(config)
    except (CommandLineError, SimulatorError, ImportError) as error:
        print(f"python -m {COMMAND}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
