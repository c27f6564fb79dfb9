"""Running one episode: who decides, what is executed, what is noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from examples.control import pose_to_action
from examples.pickplace.env import PickPlaceEnv

APPROACH_DISTANCE = 0.02  # m from the grip site to an object's bounding box


class Policy(Protocol):
    done: bool
    """True once the policy has nothing more to do; one that never knows keeps it False."""
    perturbable: bool
    """Whether a disturbance may act now."""
    path: np.ndarray | None
    """Poses (N, 4, 4) that the policy is following, for videos; None where it plans only the next step."""

    def reset(self, env: PickPlaceEnv) -> None: ...

    def target(self, env: PickPlaceEnv) -> tuple[np.ndarray, float]:
        """Desired pose (4, 4) in the world and openness in [0, 1] for the next control step."""
        ...


@dataclass(frozen=True)
class EpisodeResult:
    object: str
    container: str
    prompt: str
    success: bool
    approached: str | None
    """The object whose bounding box the grip site was the first to come within 2 cm of, the nearest of several."""
    steps: int

    @property
    def approached_named(self) -> bool:
        return self.approached == self.object


class Disturbance:
    """Pushes that the executed target suffers and the desired one does not, as in DART.

    Each control step starts a push with ``probability``: 3 to 6 steps of up to ``size`` metres in a random
    horizontal direction and upwards. Recorded episodes so come to hold recoveries from states off the path.
    """

    def __init__(self, rng: np.random.Generator, probability: float, size: float = 0.04) -> None:
        self._rng, self._probability, self._size = rng, probability, size
        self._remaining = 0
        self._offset = np.zeros(3)

    def __call__(self, world_from_ee_target: np.ndarray) -> np.ndarray:
        """The target (4, 4) to execute in place of the desired one."""
        if self._remaining == 0 and self._rng.random() < self._probability:
            self._remaining = int(self._rng.integers(3, 7))
            angle, size = self._rng.uniform(-np.pi, np.pi), self._rng.uniform(0.5, 1.0) * self._size
            self._offset = size * np.array([np.cos(angle), np.sin(angle), 0.5 * self._rng.random()])
        if self._remaining == 0:
            return world_from_ee_target
        self._remaining -= 1
        pushed = world_from_ee_target.copy()
        pushed[:3, 3] += self._offset
        return pushed


def run_episode(
    env: PickPlaceEnv,
    policy: Policy,
    max_steps: int,
    disturbance: Disturbance | None = None,
    on_step: Callable[[np.ndarray, float], None] | None = None,
) -> EpisodeResult:
    """Runs ``policy`` in a freshly reset environment until success, until it is done, or for ``max_steps``.

    ``on_step`` is called with the desired pose (4, 4) and openness before each control step. ``disturbance`` acts
    only while the policy is ``perturbable``.
    """
    policy.reset(env)
    approached: str | None = None
    success = False
    while env.time < max_steps and not success:
        pose, openness = policy.target(env)
        if policy.done:
            break
        if on_step is not None:
            on_step(pose, openness)
        pushed = disturbance(pose) if disturbance is not None and policy.perturbable else pose
        env.step(pose_to_action(pushed, openness, env.world_from_ee))
        if approached is None:
            distances = {name: env.gripper_distance(name) for name in env.scene.objects}
            nearest = min(distances, key=distances.__getitem__)
            approached = nearest if distances[nearest] < APPROACH_DISTANCE else None
        success = env.success()
    return EpisodeResult(env.task.object, env.task.container, env.prompt, success, approached, env.time)
