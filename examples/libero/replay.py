"""Converted episodes back in the simulator: their desired poses through the control rule, in closed loop.

    python -m examples.libero.replay --episodes DIR [--out results.json]

It shows that episodes hold what it takes to repeat them: nothing but desired poses and openness is executed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_utils.cli import CommandLineError, parse
from data_utils.data_loc import find_episodes
from data_utils.errors import DataError
from data_utils.files import write_json
from data_utils.h5io import Episode
from examples.errors import SimulatorError
from examples.libero import environment
from examples.libero.control import libero_action
from examples.libero.convert import BENCHMARK_ATTR, FIXTURES_ATTR, STATE_ATTR, TASK_ATTR
from examples.libero.tasks import LiberoTask, find_task

COMMAND = "examples.libero.replay"
SETTLE_STEPS = 10  # the last target is held for as long as it takes to succeed, and no longer than this


@dataclass(frozen=True)
class Arguments:
    episodes: Path
    """Folder of converted episodes, searched with its sub-folders, or one of them."""
    out: Path | None = None
    """JSON file for the outcome of every episode."""


def main(argv: list[str]) -> int:
    """Exit code: 0, 1 where a replay failed, 2 where nothing could be replayed."""
    try:
        arguments = parse(Arguments, argv, f"python -m {COMMAND}", "Replay converted LIBERO episodes in closed loop.")
        environment.enter_libero(COMMAND)
        outcomes = replay_all(converted_episodes(arguments.episodes))
    except (CommandLineError, DataError, SimulatorError, ImportError) as error:
        print(f"python -m {COMMAND}: {error}", file=sys.stderr)
        return 2
    print_table(outcomes)
    if arguments.out is not None:
        content = {"versions": environment.versions(), "episodes": outcomes}
        write_json(arguments.out, content)
    return 0 if all(outcome["success"] for outcome in outcomes) else 1


def converted_episodes(path: Path) -> list[Path]:
    """Raises ``DataError`` where there are none."""
    return [Path(file) for file in find_episodes(path, "convert some: python -m data_utils.convert libero")]


def replay_all(files: list[Path]) -> list[dict]:
    """What became of each episode: ``task``, ``episode``, ``success``, ``steps``, ``deviation`` (metres, the most)."""
    simulator = environment.import_simulator()
    outcomes, env = [], None
    for path in files:
        with Episode(path) as episode:
            task, state, fixtures = initial_state(episode)
            if env is None or env.task != task:
                if env is not None:
                    env.close()
                env = simulator.LiberoEnv(task, image_size=None)
            start(env, state, fixtures)
            recorded = episode.world_from_ee[:, 0, :3, 3]
            deviations = [np.linalg.norm(env.world_from_ee[:3, 3] - recorded[frame]) for frame in follow(env, episode)]
            success = settle(env, episode)
        name = f"{task.suite}/{task.name}"
        outcome = {"task": name, "episode": path.stem, "success": success, "steps": env.time}
        outcomes.append(outcome | {"deviation": float(max(deviations))})
        print(f"{name}/{path.stem}: {'success' if success else 'FAILURE'} after {env.time} steps", flush=True)
    return outcomes


def initial_state(episode: Episode) -> tuple[LiberoTask, np.ndarray, dict[str, np.ndarray]]:
    """The task, the MuJoCo state (D,) of the first frame, and the fixtures' poses.

    Raises DataError where the episode does not come from LIBERO, SimulatorError where its task is not installed.
    """
    attributes = episode.attributes
    missing = [key for key in (TASK_ATTR, STATE_ATTR, FIXTURES_ATTR) if key not in attributes]
    if missing or not episode.has_desired:
        what = f"has no {missing[0] if missing else 'ee_pose_desired'}"
        raise DataError(f"{episode.path}: {what}; wanted an episode converted from LIBERO or recorded in it")
    fixtures = {name: np.array(pose) for name, pose in json.loads(attributes[FIXTURES_ATTR]).items()}
    task = find_task(str(attributes[TASK_ATTR]), str(attributes.get(BENCHMARK_ATTR, "libero")))
    return task, np.array(json.loads(attributes[STATE_ATTR])), fixtures


def start(env, state: np.ndarray, fixtures: dict[str, np.ndarray]) -> None:
    """Put a ``LiberoEnv`` at an episode's first frame."""
    env.reset()
    env.set_fixtures(fixtures)
    env.set_state(state)


def follow(env, episode: Episode) -> Iterator[int]:
    """Execute an episode's desired poses; yields the number of each frame before its step."""
    desired, openness = episode.world_from_ee_desired[:, 0], episode.gripper_desired[:, 0]
    for frame in range(len(episode)):
        yield frame
        env.step(libero_action(desired[frame], openness[frame], env.world_from_ee))


def settle(env, episode: Episode) -> bool:
    """Hold the last target until the task succeeds; returns whether it did."""
    for _ in range(SETTLE_STEPS):
        if env.success():
            return True
        target, openness = episode.world_from_ee_desired[-1, 0], episode.gripper_desired[-1, 0]
        env.step(libero_action(target, openness, env.world_from_ee))
    return env.success()


def print_table(outcomes: list[dict]) -> None:
    tasks = sorted({outcome["task"] for outcome in outcomes})
    width = max(len(task) for task in tasks)
    for task in tasks:
        of_task = [outcome for outcome in outcomes if outcome["task"] == task]
        deviation = 1000 * max(outcome["deviation"] for outcome in of_task)
        done = sum(outcome["success"] for outcome in of_task)
        print(f"{task:{width}}  {done}/{len(of_task)}  off the recording by at most {deviation:.2f} mm")
    print(f"{'all':{width}}  {sum(outcome['success'] for outcome in outcomes)}/{len(outcomes)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
