"""Who can decide in an episode, by name: the trained model, the expert, a recording, chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from examples.control import MAX_TRANSLATION
from examples.libero.policy_settings import PolicyError, PolicySettings
from examples.libero.rollout import EpisodeKey, Plan, Policy

if TYPE_CHECKING:
    from examples.libero.simulator import LiberoEnv
    from examples.libero.tasks import LiberoTask


class RandomPolicy(Policy):
    """Wanders: targets up to one action away, approached for some steps, gripper at random. The floor of any score."""

    hold_steps = 5

    def begin(self, env: LiberoEnv, instruction: str, episode: EpisodeKey) -> None:
        self._rng = np.random.default_rng(episode.derived_seed("policy"))

    def instruct(self, env: LiberoEnv, instruction: str) -> None:
        return  # whatever it is told

    def plan(self, env: LiberoEnv) -> Plan:
        target = env.world_from_ee
        target[:3, 3] += self._rng.uniform(-MAX_TRANSLATION, MAX_TRANSLATION, 3)
        poses = np.repeat(target[None], self.hold_steps, axis=0)
        return Plan(poses, np.full(self.hold_steps, float(self._rng.integers(2))))


# What each needs is imported when it is asked for: a service's client wants no torch, chance no connection.
def _model(settings: PolicySettings) -> Policy:
    from examples.libero.model_policy import ModelPolicy, open_planner

    return ModelPolicy(*open_planner(settings))


def _expert(settings: PolicySettings) -> Policy:
    from examples.libero.expert import ScriptedExpert

    return ScriptedExpert()


def _replay(settings: PolicySettings) -> Policy:
    from examples.libero.replay_policy import ReplayPolicy

    return ReplayPolicy(settings.demos)


POLICIES: dict[str, Callable[[PolicySettings], Policy]] = {
    "model": _model,
    "expert": _expert,
    "replay": _replay,
    "random": lambda settings: RandomPolicy(),
}


def make_policy(settings: PolicySettings) -> Policy:
    """Raises ``PolicyError`` or what the policy's own parts raise where something that it needs is not there."""
    if settings.name not in POLICIES:
        raise PolicyError(f"there is no policy {settings.name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[settings.name](settings)


def describe_policy(settings: PolicySettings) -> dict[str, Any]:
    """What a policy's outcomes depend on (JSON-able), found out before anything is run.

    Raises ``PolicyError`` or ``TransportError`` for a model that is not there or does not suit LIBERO.
    """
    if settings.name == "model":
        from examples.libero.model_policy import describe_model

        return {"name": "model", **describe_model(settings)}
    return {"name": settings.name} | ({} if settings.demos is None else {"demos": settings.demos.name})


def inability(settings: PolicySettings, task: LiberoTask) -> str | None:
    """Why a policy is not asked to do a task; None: it is. The expert knows what it cannot do."""
    if settings.name != "expert":
        return None
    from examples.libero.expert import inability

    return inability(task, task.problem.goal)


def recorded_episodes(settings: PolicySettings) -> Mapping[str, Mapping[int, Sequence[int]]] | None:
    """Suite -> task id -> episode ids that the policy can do; None: those of the benchmark."""
    if settings.name != "replay":
        return None
    from examples.libero.replay_policy import recorded_episodes

    return recorded_episodes(settings.demos)
