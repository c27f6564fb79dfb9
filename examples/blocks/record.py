"""Records demonstrations of the scripted expert in the world of blocks.

    python -m examples.blocks.record --out data/blocks --episodes 250 --seed 0 --workers 2

As ``examples.pickplace.record``; every episode draws its own blocks, trays and instruction. A share of the episodes
begins where a grasp has just missed, the fingers closed beside the block: what is recorded is how it is tried again.
Another share begins on the way to a block that is not meant, so that where the arm is does not say which block is.
With ``--lead CKPT`` a policy begins, and the expert takes over wherever it got to (DAgger, Ross et al., AISTATS 2011).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.blocks.env import BlocksEnv
from examples.blocks.shipped import load_planner, model_policy
from examples.blocks.world import WORLD_FILE, World, load_world
from examples.control import pose_to_action
from examples.pickplace.env import PickPlaceEnv
from examples.pickplace.expert import Phase, ScriptedExpert
from examples.pickplace.record import RecordConfig, main
from examples.pickplace.scene import Task

MISS = (0.02, 0.05)  # m beside the block
MISS_STEPS = 35  # control steps that it takes at most to get there and close
DETOUR_STEPS = (4, 32)  # control steps towards a block that is not meant
LEAD_STEPS = (12, 80)  # control steps of a policy before the expert takes over


@dataclass(frozen=True)
class BlocksRecordConfig(RecordConfig):
    image_size: int = 128
    scene: str = str(WORLD_FILE)
    """Path of a world file."""
    split: str = "SO"
    misses: float = 0.3
    """Share of the episodes that begin where a grasp has missed."""
    detours: float = 0.25
    """Share of the episodes that begin on the way to another block than the named one."""
    nearest: float | None = None
    """Share of the episodes in which the named block lies nearest to the trays, and need not be named; None: chance."""
    confusable: float | None = None
    """Share of the episodes in which other blocks have the named one's colour and its shape; None: the world's."""
    lead: Path | None = None
    """Policy that begins the other episodes, a run's .pt or an exported folder; None: they begin with the expert."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.misses >= 0 and self.detours >= 0 and self.misses + self.detours <= 1):
            raise ValueError(
                f"--misses {self.misses} and --detours {self.detours} are shares of the episodes: neither below 0, "
                "at most 1 together"
            )
        if self.nearest is not None and not 0 <= self.nearest <= 1:
            raise ValueError(f"--nearest is {self.nearest}; it is a share of the episodes, between 0 and 1")

    def make_env(self) -> BlocksEnv:
        return BlocksEnv(self.split, self.image_size, self._world(), self.paraphrases, self.nearest)

    def _world(self) -> World:
        return load_world(Path(self.scene)).with_confusable(self.confusable)

    def check(self) -> None:
        self._world().split(self.split)
        if self.lead is not None and not self.lead.exists():
            raise FileNotFoundError(f"--lead {self.lead} does not exist")

    def begin(self, env: PickPlaceEnv, seed: list[int], index: int) -> None:
        env.reset_episode(seed, index)
        rng = np.random.default_rng([*seed, 0, 3])
        beginning = rng.random()
        if beginning < self.misses:
            miss(env, rng)
        elif beginning < self.misses + self.detours:
            detour(env, rng)
        elif self.lead is not None and not lead(env, rng, _planner(self.lead)):
            env.reset_episode(seed, index)

    def settings(self) -> dict:
        return super().settings() | {
            "split": self.split,
            "misses": self.misses,
            "detours": self.detours,
            "nearest": self.nearest,
            "confusable": self.confusable,
            "lead": None if self.lead is None else str(self.lead),
        }


def miss(env: PickPlaceEnv, rng: np.random.Generator) -> None:
    """Bring the gripper down beside the named block and close it, then let the clock start anew."""
    expert = ScriptedExpert()
    expert.reset(env)
    goal = expert.grasp_pose()
    angle, distance = rng.uniform(-np.pi, np.pi), rng.uniform(*MISS)
    goal[:2, 3] += distance * np.array([np.cos(angle), np.sin(angle)])
    above = goal.copy()
    above[2, 3] += 0.10
    closing = int(rng.integers(0, 6))  # of the last steps; an open hand beside the block is a state to learn from too
    for step in range(MISS_STEPS):
        target = above if step < MISS_STEPS // 2 else goal
        openness = 0.0 if step >= MISS_STEPS - closing else 1.0
        env.step(pose_to_action(target, openness, env.world_from_ee))
    env.time = 0


def detour(env: PickPlaceEnv, rng: np.random.Generator) -> None:
    """Set out for another block than the named one, at most until it is held, then let the clock start anew."""
    named = env.task
    env.task = Task(str(rng.choice([name for name in env.present if name != named.object])), named.container)
    expert = ScriptedExpert()
    expert.reset(env)
    for _ in range(int(rng.integers(*DETOUR_STEPS))):
        pose, openness = expert.target(env)
        if expert.phase not in (Phase.APPROACH, Phase.CLOSE):
            break
        env.step(pose_to_action(pose, openness, env.world_from_ee))
    env.task = named
    env.time = 0


def lead(env: PickPlaceEnv, rng: np.random.Generator, planner) -> bool:
    """Let a policy act for some time, then let the clock start anew. False where it then holds the named block or is
    done with it: nothing is to be mended."""
    policy = model_policy(planner, int(rng.integers(2**31)))
    policy.reset(env)
    for _ in range(int(rng.integers(*LEAD_STEPS))):
        pose, openness = policy.target(env)
        env.step(pose_to_action(pose, openness, env.world_from_ee))
    env.time = 0
    named = env.task.object
    held = env.gripper_distance(named) < 0.01 and env.openness < 0.9
    return not held and env.container_of(named) is None


@functools.lru_cache(maxsize=1)
def _planner(ckpt: Path):
    """This process's policy."""
    import torch  # only where a policy leads

    torch.set_num_threads(1)
    return load_planner(ckpt)


if __name__ == "__main__":
    main(BlocksRecordConfig, "examples.blocks.record")
