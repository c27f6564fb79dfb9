"""Running one episode: where it begins, who plans, what is executed, what is noted."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from examples.errors import SimulatorError
from examples.libero.control import libero_action
from examples.libero.tasks import LiberoTask

if TYPE_CHECKING:
    from examples.libero.simulator import LiberoEnv

WAIT_STEPS = 10  # things that start in the air fall and come to rest
WAITING = np.array([0.0] * 6 + [-1.0])  # no motion, gripper open


@dataclass(frozen=True)
class EpisodeKey:
    """Names an episode: results are filed by it, and every random number of the episode follows from it."""

    suite: str
    task_id: int
    episode_id: int
    """Number of the stored initial state, or of the recorded episode."""
    seed: int = 0
    """Of the run."""
    repeat: int = 0
    """Another number is the same episode with other noise in the policy."""

    def derived_seed(self, purpose: str) -> int:
        """A seed in [0, 2^32) of the episode's own, another one for each ``purpose``."""
        words = [zlib.crc32(text.encode()) for text in (self.suite, purpose)]
        if purpose == "policy" and self.repeat:
            words.append(self.repeat)
        return int(np.random.SeedSequence([self.seed, self.task_id, self.episode_id, *words]).generate_state(1)[0])


@dataclass(frozen=True)
class Start:
    """Where an episode begins."""

    state: np.ndarray | None = None
    """MuJoCo state (D,); None: everything is where it was drawn at reset."""
    fixtures: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Poses (7,) of fixtures, which states do not hold; those left out are drawn at reset."""
    wait_steps: int = WAIT_STEPS


@dataclass(frozen=True)
class Plan:
    """What a policy wants next, one target per control step."""

    poses: np.ndarray
    """(T, 4, 4) ``world_from_ee``."""
    openness: np.ndarray
    """(T,) in [0, 1]."""
    path: np.ndarray | None = None
    """Poses (N, 4, 4) to draw into videos; None: ``poses``."""

    def __post_init__(self) -> None:
        poses, openness = np.shape(self.poses), np.shape(self.openness)
        if len(poses) != 3 or poses[0] < 1 or poses[1:] != (4, 4) or openness != poses[:1]:
            raise ValueError(f"plan of shapes {poses} and {openness}; wanted poses (T, 4, 4) and openness (T,), T >= 1")


class Policy(ABC):
    """Who decides. One object serves many episodes, one after another, and belongs to one process."""

    needs_images = False
    """Whether :meth:`plan` renders; where nobody renders, no OpenGL is started."""

    def start(self, task: LiberoTask, episode: EpisodeKey) -> Start:
        """Where ``episode`` begins: at the benchmark's stored initial state, unless a policy knows better."""
        return stored_start(task, episode.episode_id)

    @abstractmethod
    def begin(self, env: LiberoEnv, instruction: str, episode: EpisodeKey) -> None:
        """A new episode: the environment is at its start, things have come to rest, ``env.time`` is 0."""

    @abstractmethod
    def plan(self, env: LiberoEnv) -> Plan | None:
        """What to do from now on; None where the policy has nothing more to do, which ends the episode."""

    def instruct(self, env: LiberoEnv, instruction: str) -> None:
        """Another instruction from now on, in the episode that runs."""
        raise NotImplementedError(f"{type(self).__name__} follows no second instruction")

    def observe(self, env: LiberoEnv) -> None:  # noqa: B027 (most look at queries alone)
        """Called before every step at which no plan is asked for, for policies that look back."""

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """No more episodes follow."""


@dataclass(frozen=True)
class EpisodeResult:
    success: bool
    steps: int
    """Control steps, those spent waiting left out."""
    queries: int
    """Plans that were made."""
    ee_path: np.ndarray
    """(steps + 1, 3), the end-effector's positions in the world."""


def stored_start(task: LiberoTask, number: int) -> Start:
    """The benchmark's initial state ``number``. Raises ``SimulatorError`` where there are not so many."""
    states = task.initial_states()
    if not 0 <= number < len(states):
        raise SimulatorError(
            f"{task.suite}/{task.name} has no initial state {number}; it has {len(states)}: lower --num_trials_per_task"
        )
    return Start(states[number])


def begin_at(env: LiberoEnv, start: Start, seed: int) -> None:
    """Put ``env`` at a start and let things come to rest; what the start does not tell is drawn from ``seed``."""
    env.reset(seed)
    env.set_fixtures(start.fixtures)
    if start.state is not None:
        env.set_state(start.state)
    for _ in range(start.wait_steps):
        env.step(WAITING)
    env.time = 0


def run_episode(
    env: LiberoEnv,
    policy: Policy,
    key: EpisodeKey,
    instruction: str,
    max_steps: int,
    execute_steps: int,
    on_step: Callable[[Plan], None] | None = None,
    succeeded: Callable[[LiberoEnv], bool] | None = None,
) -> EpisodeResult:
    """Run ``policy`` until success, until it has nothing more to do, or for ``max_steps`` control steps.

    The first ``execute_steps`` targets of each plan are executed, each in closed loop from the newest pose; then the
    policy plans again. Nothing here depends on what ran before in the same process.

    Args:
        on_step: called with the current plan before every control step.
        succeeded: tells success; None: the task's own goal.
    """
    if max_steps < 1 or execute_steps < 1:
        raise ValueError(f"max_steps is {max_steps} and execute_steps {execute_steps}; both must be at least 1")
    succeeded = succeeded or type(env).success
    begin_at(env, policy.start(env.task, key), key.derived_seed("scene"))
    path = [env.world_from_ee[:3, 3]]
    policy.begin(env, instruction, key)
    success, queries = pursue(env, policy, max_steps, execute_steps, succeeded, path, on_step)
    return EpisodeResult(success, env.time, queries, np.array(path))


def pursue(
    env: LiberoEnv,
    policy: Policy,
    until: int,
    execute_steps: int,
    succeeded: Callable[[LiberoEnv], bool],
    path: list[np.ndarray],
    on_step: Callable[[Plan], None] | None = None,
) -> tuple[bool, int]:
    """Let ``policy`` go on from the present moment, up to the control step ``until``: whether it succeeded, and how
    many plans it made. The end-effector's position after every step is appended to ``path``."""
    success, queries = False, 0
    while env.time < until and not success and (plan := policy.plan(env)) is not None:
        queries += 1
        for step, (pose, openness) in enumerate(zip(plan.poses, plan.openness, strict=True)):
            if step == execute_steps or success or env.time >= until:
                break
            if step > 0:
                policy.observe(env)
            if on_step is not None:
                on_step(plan)
            env.step(libero_action(pose, float(openness), env.world_from_ee))
            path.append(env.world_from_ee[:3, 3])
            success = succeeded(env)
    return success, queries
