"""Running one episode: who decides, what is executed, what is noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from examples.control import pose_to_action
from examples.disturbance import Disturbance
from examples.pickplace.env import PickPlaceEnv

APPROACH_DISTANCE = 0.02  # m from the grip site to an object's bounding box
LIFTED = 0.04  # m above where an object was at first


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
    lifted: str | None
    """The object that was the first to rise by 4 cm."""
    ended_in: str | None
    """The container that the named object lies in at the end, released or not."""
    steps: int

    @property
    def approached_named(self) -> bool:
        return self.approached == self.object


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
    lifted: str | None = None
    resting = {name: env.world_from_object(name)[2, 3] for name in env.present}
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
            distances = {name: env.gripper_distance(name) for name in env.present}
            nearest = min(distances, key=distances.__getitem__)
            approached = nearest if distances[nearest] < APPROACH_DISTANCE else None
        if lifted is None:
            lifted = next((n for n in env.present if env.world_from_object(n)[2, 3] > resting[n] + LIFTED), None)
        success = env.success()
    ended_in = env.container_of(env.task.object)
    names = [name if name is None else env.title(name) for name in (approached, lifted, ended_in)]
    return EpisodeResult(
        env.title(env.task.object), env.title(env.task.container), env.prompt, success, *names, env.time
    )
