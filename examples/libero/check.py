"""Does the simulator work here? A scene of every suite is built, stepped and rendered.

    python -m examples.libero.check [--benchmarks libero libero-pro]

Of LIBERO-plus's suites, a task that LIBERO's assets suffice for and one that needs its own. Prints the versions, warns
where they are not the pinned ones, and ends with a line that counts the suites that work. Exit code: 0 where every
suite works, 1 where one does not (each is named, with what to do), 2 where nothing could be checked.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_utils.cli import CommandLineError, parse
from data_utils.worker_process import WorkerDied, WorkerProcess
from examples.errors import SceneError, SimulatorError
from examples.headless import select_gl
from examples.libero import environment
from examples.libero.benchmarks import BENCHMARKS, OWN_ASSETS, find_benchmark
from examples.libero.environment import assets_hint
from examples.libero.rollout import WAITING
from examples.libero.tasks import LiberoTask, suite_tasks

COMMAND = "examples.libero.check"
WORKS, NEEDS_ASSETS, FAILS = "work", "need more assets", "fail"
STEPS = 10
IMAGE_SIZE = 64
DARKEST = 5.0  # mean of an image's pixels; one that shows anything is brighter


@dataclass(frozen=True)
class Arguments:
    benchmarks: tuple[str, ...] = tuple(BENCHMARKS)
    suites: tuple[str, ...] = ()
    """None: those that the benchmarks report."""


def main(argv: Sequence[str]) -> int:
    try:
        arguments = parse(Arguments, argv, f"python -m {COMMAND}", "Check that LIBERO's scenes work here.")
        environment.enter_libero(COMMAND)
        print(f"rendering with {select_gl()}")
        states = {name: check_benchmark(name, arguments.suites) for name in arguments.benchmarks}
    except (CommandLineError, SimulatorError, ImportError) as error:
        print(f"python -m {COMMAND}: {error}", file=sys.stderr)
        return 2
    print(verdict(states))
    return 0 if all(state == WORKS for suites in states.values() for state in suites.values()) else 1


def verdict(states: Mapping[str, Mapping[str, str]]) -> str:
    """A line that counts the suites by what was found, from benchmark -> suite -> state, and says what to do."""
    suites = [(name, suite, state) for name, of in states.items() for suite, state in of.items()]
    parts = [f"{sum(state == WORKS for *_, state in suites)} work"]
    for wanted in (NEEDS_ASSETS, FAILS):
        if named := [f"{name} {suite}" for name, suite, state in suites if state == wanted]:
            parts.append(f"{len(named)} {wanted}: {', '.join(named)}")
    lacking = dict.fromkeys(name for name, _, state in suites if state == NEEDS_ASSETS)
    return "\n".join([f"{len(suites)} suites: {'; '.join(parts)}", *(f"{n}: {assets_hint(n)}" for n in lacking)])


def check_benchmark(name: str, suites: Sequence[str] = ()) -> dict[str, str]:
    """What is the matter with each suite of a benchmark: ``WORKS``, ``NEEDS_ASSETS`` or ``FAILS``; says it too."""
    suites = suites or find_benchmark(name).suites
    try:
        environment.check_assets(name)
    except SimulatorError as error:
        print(f"{name}: FAILS: {error}", flush=True)
        return dict.fromkeys(suites, NEEDS_ASSETS)
    try:
        environment.check_assets(name)
        versions = environment.versions(name)
        print(f"{name}: {', '.join(map(' '.join, versions.items()))}")
        for line in environment.unpinned(versions):
            print(f"  {line}")
        tasks = [task for suite in suites for task in _sample(suite, name)]
    except SimulatorError as error:
        print(f"{name}: FAILS: {error}", flush=True)
        return dict.fromkeys(suites, FAILS)
    states = dict.fromkeys(suites, WORKS)
    for task in tasks:
        said, state = _in_a_process(task)
        if states[task.suite] != FAILS and state != WORKS:
            states[task.suite] = state
        changed = f", {task.perturbation.category}" if task.perturbation else ""
        print(f"  {task.suite}{changed}: {'' if state == WORKS else 'FAILS: '}{said}", flush=True)
    return states


def check_scene(task: LiberoTask) -> tuple[str, str]:
    """What to say of a task's scene, and whether it works."""
    try:
        started = time.perf_counter()
        with environment.import_simulator(task.benchmark).LiberoEnv(task, IMAGE_SIZE) as env:
            env.reset()
            env.set_state(task.initial_states()[0])
            built = time.perf_counter()
            for _ in range(STEPS):
                env.step(WAITING)
            stepped = time.perf_counter()
            brightness = {camera: float(env.rgb(camera).mean()) for camera in env.cameras}
            rendered = time.perf_counter()
            if not np.isfinite(env.state).all():
                return "the physics gives numbers that are not finite; install the pinned versions", FAILS
    except SceneError as error:
        return str(error), NEEDS_ASSETS
    except (SimulatorError, ImportError) as error:
        return str(error), FAILS
    if dark := [camera for camera, mean in brightness.items() if mean < DARKEST]:
        return f"{' and '.join(dark)} show nothing but black; try MUJOCO_GL=osmesa or MUJOCO_GL=egl", FAILS
    return (
        f"works: built in {built - started:.1f} s, {STEPS / (stepped - built):.0f} steps/s, "
        f"{(rendered - stepped) / len(brightness):.2f} s per image of {IMAGE_SIZE} pixels"
    ), WORKS


def _sample(suite: str, benchmark: str) -> list[LiberoTask]:
    """The suite's first task; of LIBERO-plus, the first that LIBERO's assets suffice for, and the first that needs its
    own."""
    found: dict[bool, LiberoTask] = {}
    for task in suite_tasks(suite, benchmark):
        own = task.perturbation is not None and task.perturbation.category in OWN_ASSETS
        if own not in found and task.fault is None:
            found[own] = task
            if len(found) == 2 or benchmark != "libero-plus":
                break
    if found:
        return [found[own] for own in sorted(found)]
    raise SimulatorError(f"no task of {suite} can be run; install the package of {benchmark} again")


def _in_a_process(task: LiberoTask) -> tuple[str, str]:
    """:func:`check_scene` in a process of its own, which an OpenGL library may take with it."""
    worker = WorkerProcess(check_scene)
    try:
        worker.outcome()  # ready
        worker.give(task)
        return worker.outcome()
    except WorkerDied as death:
        return f"the process {death}; try another MUJOCO_GL: osmesa or egl", FAILS
    finally:
        worker.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
