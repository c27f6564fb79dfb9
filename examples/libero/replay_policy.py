"""Recorded episodes as a policy: desired poses and openness, nothing else, in chunks as a model gives them.

A sanity baseline: where it fails, the pose-to-action rule, the control loop or the recording is wrong, not a model.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_utils.h5io import Episode
from examples.libero.replay import SETTLE_STEPS, converted_episodes, initial_state
from examples.libero.rollout import EpisodeKey, Plan, Policy, Start
from examples.libero.tasks import LiberoTask

if TYPE_CHECKING:
    from examples.libero.simulator import LiberoEnv

CHUNK = 16  # targets in a plan


class ReplayPolicy(Policy):
    """Follows the recorded episode of the key's number, from that episode's own initial state.

    Args:
        demos: folder of recorded or converted episodes, or one of them.
    Raises:
        DataError: there are none, or one does not come from LIBERO.
        SimulatorError: an episode's task is not installed.
    """

    def __init__(self, demos: Path) -> None:
        self._files = _files(demos)

    def start(self, task: LiberoTask, episode: EpisodeKey) -> Start:
        with Episode(self._files[episode.suite, episode.task_id][episode.episode_id]) as recorded:
            _, state, fixtures = initial_state(recorded)
        return Start(state, fixtures, wait_steps=0)

    def begin(self, env: LiberoEnv, instruction: str, episode: EpisodeKey) -> None:
        with Episode(self._files[episode.suite, episode.task_id][episode.episode_id]) as recorded:
            self._poses = recorded.world_from_ee_desired[:, 0].astype(np.float64)  # (T, 4, 4)
            self._openness = recorded.gripper_desired[:, 0].astype(np.float64)  # (T,)

    def instruct(self, env: LiberoEnv, instruction: str) -> None:
        return  # it goes on with its recording

    def plan(self, env: LiberoEnv) -> Plan | None:
        if env.time >= len(self._poses) + SETTLE_STEPS:
            return None
        steps = np.minimum(np.arange(env.time, env.time + CHUNK), len(self._poses) - 1)  # the last target is held
        return Plan(self._poses[steps], self._openness[steps])


def recorded_episodes(demos: Path) -> dict[str, dict[int, list[int]]]:
    """Suite -> task id -> numbers of the episodes, as :class:`ReplayPolicy` counts them; raises what it raises."""
    numbers: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for (suite, task_id), files in _files(demos).items():
        numbers[suite][task_id] = list(range(len(files)))
    return dict(numbers)


def _files(demos: Path) -> dict[tuple[str, int], list[Path]]:
    """(Suite, task id) -> episode files in the order of their names."""
    files: dict[tuple[str, int], list[Path]] = defaultdict(list)
    for path in converted_episodes(demos):
        with Episode(path) as episode:
            task, _, _ = initial_state(episode)
        files[task.suite, task.task_id].append(path)
    return dict(files)
