"""A world of blocks that goes on: at any moment it may be told something else to do, be disturbed, or begin anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from examples.blocks.env import BlocksEnv
from examples.blocks.shipped import model_policy
from examples.control import pose_to_action

PATIENCE = 160  # control steps per instruction
PUSH_SPEED = (0.5, 0.9)  # m/s: 1 to 4 cm on the bin's floor


@dataclass(frozen=True)
class Status:
    """What a person is told."""

    instruction: str
    state: str
    """``waiting``, ``working``, ``done`` or ``given up``."""
    note: str
    steps: int
    """Since the instruction was given."""

    def __str__(self) -> str:
        working = f" · step {self.steps}" if self.state != "waiting" else ""
        return f"{self.state}{working}: {self.instruction}" + (f" · {self.note}" if self.note else "")


class LiveWorld:
    """One simulator and one policy; all calls from one thread, which OpenGL wants.

    Args:
        planner: see :class:`examples.pickplace.policies.ModelPolicy`.
        seed: of the scenes and pushes.
    """

    def __init__(self, env: BlocksEnv, planner, seed: int = 0) -> None:
        self.env = env
        self._planner, self._seed = planner, seed
        self._policy = model_policy(planner)
        self._rng = np.random.default_rng([seed, 1])
        self._scenes = 0
        self.new_scene()

    @property
    def path(self) -> np.ndarray | None:
        """Poses (Ta, 4, 4) that the policy is following."""
        return self._policy.path if self._working else None

    @property
    def status(self) -> Status:
        until = self.env.time if self._working else self._ended
        return Status(self.env.prompt, self._state, self._note, until - self._began)

    def new_scene(self) -> None:
        """Other blocks, trays and places; nothing happens until there is an instruction. The status has an example."""
        self.env.reset([self._seed, self._scenes])
        self._scenes += 1
        self._planner.reset()
        self._enter("waiting", "an example; change it or let it run")

    def instruct(self, text: str) -> None:
        """Do this from now on. What cannot be done is said in the status; what was being done then stops."""
        try:
            self.env.instruct(text)
        except ValueError as error:
            self._enter("waiting", str(error))
            return
        self._policy.reset(self.env)
        self._enter("working", "")

    def push(self) -> None:
        """Push a block that lies there, the named one if it is not held."""
        env, named = self.env, self.env.task.object
        held = env.gripper_distance(named) < 0.03 and env.openness < 0.9
        others = [name for name in env.present if name != named]
        name = others[int(self._rng.integers(len(others)))] if held else named
        angle, speed = self._rng.uniform(-np.pi, np.pi), self._rng.uniform(*PUSH_SPEED)
        env.push(name, (speed * np.cos(angle), speed * np.sin(angle)))
        self._note = f"the {env.title(name)} was pushed"

    def step(self, watch: Callable[[np.ndarray, float], None] | None = None) -> None:
        """A control step; where there is nothing to do, the gripper stays.

        Args:
            watch: called with the desired pose (4, 4) and openness before it.
        """
        env = self.env
        if not self._working:
            env.step(pose_to_action(*self._rest, env.world_from_ee))
            return
        pose, openness = self._policy.target(env)
        if watch is not None:
            watch(pose, openness)
        env.step(pose_to_action(pose, openness, env.world_from_ee))
        if env.success():
            named, tray = env.title(env.task.object), env.title(env.task.container)
            self._enter("done", f"the {named} is in the {tray}", keep=True)
        elif self.status.steps >= PATIENCE:
            self._enter("given up", f"not done within {PATIENCE} steps", keep=True)

    @property
    def _working(self) -> bool:
        return self._state == "working"

    def _enter(self, state: str, note: str, keep: bool = False) -> None:
        """``keep``: go on counting the steps of the instruction."""
        self._state, self._note = state, note
        if not keep:
            self._began = self.env.time
        self._ended = self.env.time
        self._rest = self.env.world_from_ee, float(self.env.openness > 0.9)  # a grip is not let go of
