"""Does the simulator work here? A scene of every suite is built, stepped and rendered.

    python -m examples.libero.check [--benchmarks libero libero-pro]

Prints the versions and warns where they are not the pinned ones. Exit code: 0 where every suite works, 1 where one does
not (each is named, with what to do), 2 where nothing could be checked.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_utils.cli import CommandLineError, parse
from data_utils.worker_process import WorkerDied, WorkerProcess
from examples.errors import SimulatorError
from examples.headless import select_gl
from examples.libero import environment
from examples.libero.benchmarks import BENCHMARKS, find_benchmark
from examples.libero.rollout import WAITING
from examples.libero.tasks import LiberoTask, suite_tasks

COMMAND = "examples.libero.check"
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
        works = [check_benchmark(name, arguments.suites) for name in arguments.benchmarks]
    except (CommandLineError, SimulatorError, ImportError) as error:
        print(f"python -m {COMMAND}: {error}", file=sys.stderr)
        return 2
    return 0 if all(works) else 1


def check_benchmark(name: str, suites: Sequence[str] = ()) -> bool:
    """Whether every suite of a benchmark works; says which does not."""
    benchmark, works = find_benchmark(name), True
    try:
        environment.check_assets(name)
        versions = environment.versions(name)
        print(f"{name}: {', '.join(map(' '.join, versions.items()))}")
        for line in environment.unpinned(versions):
            print(f"  {line}")
        tasks = [_first_task(suite, name) for suite in suites or benchmark.suites]
    except SimulatorError as error:
        print(f"{name}: FAILS: {error}", flush=True)
        return False
    for task in tasks:
        said, fault = _in_a_process(task)
        works &= not fault
        print(f"  {task.suite}: {'FAILS: ' if fault else ''}{said}", flush=True)
    return works


def check_scene(task: LiberoTask) -> tuple[str, bool]:
    """What to say of a task's scene, and whether something is wrong with it."""
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
                return "the physics gives numbers that are not finite; install the pinned versions", True
    except (SimulatorError, ImportError) as error:
        return str(error), True
    if dark := [camera for camera, mean in brightness.items() if mean < DARKEST]:
        return f"{' and '.join(dark)} show nothing but black; try MUJOCO_GL=osmesa or MUJOCO_GL=egl", True
    return (
        f"works: built in {built - started:.1f} s, {STEPS / (stepped - built):.0f} steps/s, "
        f"{(rendered - stepped) / len(brightness):.2f} s per image of {IMAGE_SIZE} pixels"
    ), False


def _first_task(suite: str, benchmark: str) -> LiberoTask:
    for task in suite_tasks(suite, benchmark):
        if task.fault is None:
            return task
    raise SimulatorError(f"no task of {suite} can be run; install the package of {benchmark} again")


def _in_a_process(task: LiberoTask) -> tuple[str, bool]:
    """:func:`check_scene` in a process of its own, which an OpenGL library may take with it."""
    worker = WorkerProcess(check_scene)
    try:
        worker.outcome()  # ready
        worker.give(task)
        return worker.outcome()
    except WorkerDied as death:
        return f"the process {death}; try another MUJOCO_GL: osmesa or egl", True
    finally:
        worker.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
