"""The loop around a policy: what is executed, when it ends, and that an episode follows from its key alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.errors import SimulatorError
from examples.libero.control import libero_action
from examples.libero.rollout import EpisodeKey, Plan, Policy, Start, run_episode, stored_start
from examples.libero.tasks import LiberoTask

KEY = EpisodeKey("libero_object", 0, 0)
TASK = LiberoTask("libero_object", 0, "pick_up_the_soup", Path())


class Points:
    """A hand that goes where actions send it, 0.05 m per unit; the task is to reach x = ``goal``."""

    def __init__(self, goal: float = np.inf) -> None:
        self.task, self.goal, self.time, self.executed = TASK, goal, 0, []

    def reset(self, seed: int) -> None:
        self.seed, self.world_from_ee = seed, np.eye(4)

    def set_fixtures(self, poses) -> None:
        self.fixtures = poses

    def set_state(self, state) -> None:
        self.time = 0

    def step(self, action) -> None:
        self.world_from_ee = self.world_from_ee.copy()
        self.world_from_ee[:3, 3] += 0.05 * action[:3]
        self.executed.append(action)
        self.time += 1

    def success(self) -> bool:
        return bool(self.world_from_ee[0, 3] >= self.goal - 1e-9)


class Ahead(Policy):
    """Plans ``length`` steps of 1 cm along x from where the hand is; stops after ``plans`` plans."""

    def __init__(self, length: int = 8, plans: int = 10**6) -> None:
        self.length, self.plans, self.planned_at = length, plans, []

    def start(self, task, episode) -> Start:
        return Start(np.zeros(1), wait_steps=4)

    def begin(self, env, instruction, episode) -> None:
        self.begun = instruction, episode, env.time

    def plan(self, env) -> Plan | None:
        if len(self.planned_at) == self.plans:
            return None
        self.planned_at.append(env.time)
        poses = np.repeat(env.world_from_ee[None], self.length, axis=0)
        poses[:, 0, 3] += 0.01 * np.arange(1, self.length + 1)
        return Plan(poses, np.ones(self.length))


def test_so_many_steps_of_a_plan_are_executed_before_the_next():
    env, policy = Points(), Ahead()
    result = run_episode(env, policy, KEY, "go ahead", max_steps=8, execute_steps=3)
    assert policy.planned_at == [0, 3, 6] and result.queries == 3
    assert policy.begun == ("go ahead", KEY, 0)
    assert (result.success, result.steps, result.ee_path.shape) == (False, 8, (9, 3))
    # Each target is chased from the newest pose: 1 cm per step, also within a plan.
    np.testing.assert_allclose(result.ee_path[:, 0], 0.01 * np.arange(9), atol=1e-12)
    waiting, moving = env.executed[:4], env.executed[4:]
    np.testing.assert_array_equal(waiting, np.tile([0, 0, 0, 0, 0, 0, -1], (4, 1)))
    ahead = np.eye(4)
    ahead[0, 3] = 0.01
    np.testing.assert_allclose(moving, np.tile(libero_action(ahead, 1.0, np.eye(4)), (8, 1)), atol=1e-12)


def test_a_plan_shorter_than_what_may_be_executed_is_executed_whole():
    policy = Ahead(length=2)
    run_episode(Points(), policy, KEY, "", max_steps=6, execute_steps=50)
    assert policy.planned_at == [0, 2, 4]


def test_success_ends_an_episode_within_a_plan_and_an_idle_policy_ends_it_too():
    result = run_episode(Points(goal=0.05), Ahead(), KEY, "", max_steps=100, execute_steps=3)
    assert (result.success, result.steps) == (True, 5)
    result = run_episode(Points(), Ahead(plans=2), KEY, "", max_steps=100, execute_steps=3)
    assert (result.success, result.steps, result.queries) == (False, 6, 2)


def test_another_goal_than_the_tasks_may_be_asked_for():
    def beyond(env) -> bool:
        return env.world_from_ee[0, 3] > 0.025

    result = run_episode(Points(), Ahead(), KEY, "", max_steps=100, execute_steps=8, succeeded=beyond)
    assert (result.success, result.steps) == (True, 3)


def test_a_watcher_sees_the_plan_before_every_step():
    seen, env = [], Points()
    run_episode(env, Ahead(), KEY, "", 5, 3, on_step=lambda plan: seen.append((env.time, plan.poses[0, 0, 3])))
    assert [time for time, _ in seen] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose([first for _, first in seen], [0.01] * 3 + [0.04] * 2, atol=1e-12)


def test_seeds_follow_from_the_episode_and_the_purpose_alone():
    seeds = {
        EpisodeKey(suite, task, episode, seed).derived_seed(purpose)
        for suite in ("libero_object", "libero_goal")
        for task in range(3)
        for episode in range(3)
        for seed in range(2)
        for purpose in ("scene", "policy")
    }
    assert len(seeds) == 72
    assert EpisodeKey("libero_object", 3, 7, 1).derived_seed("policy") == 3448472801  # the same on every machine
    env = Points()
    run_episode(env, Ahead(), KEY, "", 1, 1)
    assert env.seed == KEY.derived_seed("scene")


@pytest.mark.parametrize(
    ("poses", "openness"), [(np.eye(4), 1.0), (np.eye(4)[None], np.ones(2)), (np.zeros((0, 4, 4)), np.ones(0))]
)
def test_plans_of_other_shapes_are_refused(poses, openness):
    with pytest.raises(ValueError, match=r"wanted poses \(T, 4, 4\) and openness \(T,\)"):
        Plan(poses, openness)


def test_an_initial_state_that_is_not_stored_is_named(monkeypatch):
    monkeypatch.setattr(LiberoTask, "initial_states", lambda self: np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(stored_start(TASK, 1).state, [3, 4, 5])
    with pytest.raises(SimulatorError, match="pick_up_the_soup has no initial state 2; it has 2"):
        stored_start(TASK, 2)
