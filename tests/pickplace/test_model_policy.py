"""How a planner's trajectories are followed, without a simulator."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from examples.pickplace.policies import ModelPolicy


class Planner:
    """Answers with chunks of 16 steps whose gripper opens ``opens_after`` steps from now; None: it never does."""

    def __init__(self, opens_after: int | None) -> None:
        self._opens_after, self.queries = opens_after, []

    def reset(self, seed: int | None = None) -> None:
        self.queries = []

    def set_prompt(self, prompt: str) -> None: ...

    def add_obs_frame(self, frame: dict) -> None:
        self._now = frame["timestamp"]

    def get_action(self):
        self.queries.append(int(self._now))
        ahead = np.arange(16)
        openness = np.zeros(16) if self._opens_after is None else (ahead >= self._opens_after).astype(float)
        return np.tile(np.eye(4), (1, 16, 1, 1, 1)), openness[None, :, None], self._now + ahead


def followed(planner: Planner, steps: int, **settings) -> list[bool]:
    """Whether the gripper is told to be open, at each step."""
    policy = ModelPolicy(planner, 4, **settings)
    env = SimpleNamespace(time=0, prompt="")
    env.obs_frame = lambda: {"timestamp": float(env.time)}
    policy.reset(env)
    told = []
    for env.time in range(steps):
        told.append(policy.target(env)[1] >= 0.5)
    return told


def test_a_planner_that_puts_opening_off_never_opens_for_long_unless_the_fingers_are_given_time():
    assert followed(planner := Planner(4), 12) == 3 * [False, False, False, True] and planner.queries == [0, 4, 8]
    told = followed(planner := Planner(4), 20, settle_steps=6)
    assert planner.queries == [0, 10] and told == 2 * (3 * [False] + 7 * [True])


def test_a_trajectory_on_which_the_gripper_stays_as_it_is_is_followed_no_longer():
    assert not any(followed(planner := Planner(None), 12, settle_steps=6)) and planner.queries == [0, 4, 8]
    assert all(followed(planner := Planner(0), 12, settle_steps=6)[1:]) and planner.queries == [0, 4, 8]


def test_no_trajectory_is_followed_beyond_its_end():
    followed(planner := Planner(4), 40, settle_steps=30)
    assert planner.queries == [0, 15, 30]


def test_settings_that_cannot_be_meant_are_refused():
    for settings in ({"execute_steps": 0}, {"execute_steps": 4, "settle_steps": -1}):
        with pytest.raises(ValueError, match="must be at least 1 and 0"):
            ModelPolicy(Planner(None), **settings)
