"""Who can decide in an episode: the trained model, a recorded episode, chance (the expert is in ``expert.py``)."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from examples.control import CLOSE_BELOW, MAX_TRANSLATION
from examples.pickplace.env import PickPlaceEnv


class ModelPolicy:
    """Queries a planner every ``execute_steps`` control steps and follows its newest trajectory in between.

    A trajectory on which the gripper opens before the next query is followed until ``settle_steps`` after that: fingers
    take some steps, and a policy that is asked meanwhile may put off again and again what it had begun.

    ``planner`` has ``reset``, ``set_prompt``, ``add_obs_frame`` and ``get_action`` as ``TrajPlanner`` has them; its
    times count control steps. A planner whose policy looks further back than the newest frame needs
    ``observe_every_step``; else frames are rendered at queries alone. ``seed``: its noise in every episode; None: it
    goes on from the episode before.
    """

    done = False
    perturbable = False

    def __init__(
        self,
        planner,
        execute_steps: int,
        observe_every_step: bool = False,
        seed: int | None = None,
        settle_steps: int = 0,
    ) -> None:
        if execute_steps < 1 or settle_steps < 0:
            what = f"execute_steps is {execute_steps} and settle_steps {settle_steps}"
            raise ValueError(f"{what}; they must be at least 1 and 0")
        self._planner, self._execute_steps, self._settle_steps = planner, execute_steps, settle_steps
        self._observe_every_step, self._seed = observe_every_step, seed

    def reset(self, env: PickPlaceEnv) -> None:
        self._planner.reset() if self._seed is None else self._planner.reset(self._seed)
        self._planner.set_prompt(env.prompt)
        self._next_query, self._opens = -np.inf, True  # where an episode begins, nothing is released
        self.path: np.ndarray | None = None  # (Ta, 4, 4), the trajectory being followed

    def target(self, env: PickPlaceEnv) -> tuple[np.ndarray, float]:
        query = env.time >= self._next_query
        if query or self._observe_every_step:
            self._planner.add_obs_frame(env.obs_frame())
        if query:
            answer = self._planner.get_action()
            if answer is None:
                raise RuntimeError("the planner gave no action although it has an observation frame")
            poses, grippers, times = (np.asarray(part, dtype=np.float64) for part in answer[:3])
            self.path, self._openness, self._times = poses[0, :, 0], grippers[0, :, 0], times  # sample 0, arm 0
            self._next_query = env.time + self._steps_to_execute(env.time)
        # The target of the step that leads from t to t + 1 is the trajectory's pose at t + 1.
        pose, openness = interpolate_trajectory(self.path, self._openness, self._times, env.time + 1.0)
        self._opens = openness >= CLOSE_BELOW
        return pose, openness

    def _steps_to_execute(self, now: int) -> int:
        """Of a trajectory that has just come, before the next query."""
        opens, steps = self._opens, self._execute_steps
        for step in range(1, steps + 1):
            openness = interpolate_trajectory(self.path, self._openness, self._times, now + float(step))[1]
            before, opens = opens, openness >= CLOSE_BELOW
            if opens and not before:
                steps = max(steps, step + self._settle_steps)
        return min(steps, max(1, int(self._times[-1] - now)))


class ReplayPolicy:
    """Replays the desired poses of a recorded episode, step by step, through the same control rule."""

    done = False
    perturbable = False

    def __init__(self, path: Path) -> None:
        with h5py.File(path, "r") as file:
            if "ee_pose_desired" not in file or "gripper_desired" not in file:
                raise ValueError(f"{path}: has no ee_pose_desired and gripper_desired; record it with this project")
            self._poses = file["ee_pose_desired"][:, 0].astype(np.float64)  # (T, 4, 4)
            self._openness = file["gripper_desired"][:, 0].astype(np.float64)  # (T,)

    def reset(self, env: PickPlaceEnv) -> None:
        self.path = self._poses

    def target(self, env: PickPlaceEnv) -> tuple[np.ndarray, float]:
        step = min(env.time, len(self._poses) - 1)
        return self._poses[step], float(self._openness[step])


class RandomPolicy:
    """Wanders: targets up to one action away, kept for some steps, gripper at random. The floor of any score."""

    done = False
    perturbable = False

    def __init__(self, rng: np.random.Generator, hold_steps: int = 5) -> None:
        self._rng, self._hold_steps = rng, hold_steps

    def reset(self, env: PickPlaceEnv) -> None:
        self.path: np.ndarray | None = None
        self._offset, self._openness = np.zeros(3), 1.0

    def target(self, env: PickPlaceEnv) -> tuple[np.ndarray, float]:
        if env.time % self._hold_steps == 0:
            self._offset = self._rng.uniform(-MAX_TRANSLATION, MAX_TRANSLATION, 3)
            self._openness = float(self._rng.integers(2))
        pose = env.world_from_ee
        pose[:3, 3] += self._offset
        return pose, self._openness


def interpolate_trajectory(
    poses: np.ndarray, openness: np.ndarray, times: np.ndarray, time: float
) -> tuple[np.ndarray, float]:
    """Pose (4, 4) and openness at ``time`` of a trajectory (Ta, 4, 4), (Ta,), (Ta,); clamped to its ends.

    Positions and openness are interpolated linearly, rotations along the geodesic.
    """
    time = float(np.clip(time, times[0], times[-1]))
    after = int(np.clip(np.searchsorted(times, time), 1, len(times) - 1)) if len(times) > 1 else 0
    before = max(after - 1, 0)
    span = times[after] - times[before]
    weight = 0.0 if span == 0 else (time - times[before]) / span
    pose = np.eye(4)
    pose[:3, 3] = (1 - weight) * poses[before, :3, 3] + weight * poses[after, :3, 3]
    rotations = Rotation.from_matrix(poses[[before, after], :3, :3])
    pose[:3, :3] = Slerp([0.0, 1.0], rotations)(weight).as_matrix()
    return pose, float((1 - weight) * openness[before] + weight * openness[after])
