"""How much of the simulator's own step rate does the LIBERO evaluator reach, the policy's time taken out?

    python -m benchmarks.libero_overhead [--steps 150 --repeats 5]

The same actions from the same initial state, both cameras rendered at every third step, two ways in turn: through the
evaluator's loop, with a planner that answers at once and whose time does not count; and in a bare loop of robosuite's
own step and the same renders. Resets and the steps spent waiting count in neither. The aim is 80%. The rate of physics
alone, nothing rendered, is told for comparison.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_utils.cli import CommandLineError, parse
from examples.errors import SimulatorError
from examples.libero import environment
from examples.libero.model_policy import LIBERO_CAMERAS, ModelPolicy
from examples.libero.rollout import EpisodeKey, begin_at, run_episode, stored_start
from examples.libero.tasks import suite_tasks

COMMAND = "benchmarks.libero_overhead"
AIM = 0.8
CHUNK = 32  # steps of a plan
CONTRACT = {
    "cameras": [{"name": name} for name in LIBERO_CAMERAS],
    "history": {"images": 1, "time_steps_back": 0},
}


@dataclass(frozen=True)
class Arguments:
    suite: str = "libero_object"
    task_id: int = 0
    steps: int = 150
    """Control steps of an episode."""
    execute_steps: int = 3
    image_size: int = 256
    repeats: int = 5
    """Episodes each way; the medians count."""


class InstantPlanner:
    """Answers with a slow circle around where the hand was first; keeps count of the time that it takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def reset(self, seed: int) -> None:
        self._centre = None

    def set_prompt(self, prompt: str) -> None:
        self.began = time.perf_counter()

    def add_obs_frame(self, frame: dict) -> None:
        before = time.perf_counter()
        self._frame = frame
        if self._centre is None:
            self._centre = frame["ee_pose"].copy()
        self.seconds += time.perf_counter() - before

    def get_action(self) -> tuple:
        before = time.perf_counter()
        times = self._frame["timestamp"] + np.arange(1, CHUNK + 1)
        poses = np.tile(self._centre, (1, CHUNK, 1, 1, 1))  # (S, Ta, Nee, 4, 4)
        poses[0, :, 0, 0, 3] += 0.05 * (np.cos(times / 20) - 1)
        poses[0, :, 0, 1, 3] += 0.05 * np.sin(times / 20)
        answer = poses, np.ones((1, CHUNK, 1)), times, None
        self.seconds += time.perf_counter() - before
        return answer


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, 1 where the aim is missed, 2 where nothing could be measured."""
    try:
        arguments = parse(Arguments, argv, f"python -m {COMMAND}", "Measure what the LIBERO evaluator adds to a step.")
        environment.enter_libero(COMMAND)
        rates = measure(arguments)
    except (CommandLineError, SimulatorError, ImportError) as error:
        print(f"python -m {COMMAND}: {error}", file=sys.stderr)
        return 2
    for name, values in rates.items():
        print(f"{name:32} {np.median(values):6.1f} steps/s  ({min(values):.1f} to {max(values):.1f})")
    ratio = np.median(rates["evaluator, policy taken out"]) / np.median(rates["simulator, same renders"])
    print(f"ratio {ratio:.3f} (aim {AIM})")
    return 0 if ratio >= AIM else 1


def measure(arguments: Arguments) -> dict[str, list[float]]:
    """What was driven -> steps per second of every repeat."""
    task = suite_tasks(arguments.suite)[arguments.task_id]
    key, start = EpisodeKey(arguments.suite, arguments.task_id, 0), stored_start(task, 0)
    rates: dict[str, list[float]] = {
        "evaluator, policy taken out": [],
        "simulator, same renders": [],
        "simulator, nothing rendered": [],
    }
    with environment.import_simulator().LiberoEnv(task, arguments.image_size) as env:
        simulator = env._env
        for repeat in range(arguments.repeats + 1):  # the first warms up, and tells the actions
            actions = []
            if repeat == 0:
                step = env.step
                env.step = lambda action, step=step, actions=actions: (actions.append(action), step(action))
            planner = InstantPlanner()
            policy = ModelPolicy(planner, CONTRACT)
            result = run_episode(env, policy, key, task.language, arguments.steps, arguments.execute_steps)
            seconds = time.perf_counter() - planner.began - planner.seconds
            if repeat == 0:
                del env.step
                driven = actions[start.wait_steps :]
                continue
            rates["evaluator, policy taken out"].append(result.steps / seconds)
            for name, rendered in (("simulator, same renders", True), ("simulator, nothing rendered", False)):
                begin_at(env, start, key.derived_seed("scene"))
                began = time.perf_counter()
                for number, action in enumerate(driven):
                    if rendered and number % arguments.execute_steps == 0:
                        for camera in env.cameras:
                            env.rgb(camera)
                        env._images.clear()  # the simulator's own step knows nothing of what was rendered
                    simulator.step(action)
                rates[name].append(len(driven) / (time.perf_counter() - began))
    return rates


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
