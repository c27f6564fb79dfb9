"""Records demonstrations of the scripted expert in the world of blocks.

    python -m examples.blocks.record --out data/blocks --episodes 250 --seed 0 --workers 2

As ``examples.pickplace.record``; every episode draws its own blocks, trays and instruction. A share of the episodes
begins where a grasp has just missed, the fingers closed beside the block: what is recorded is how it is tried again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.blocks.env import BlocksEnv
from examples.blocks.world import WORLD_FILE, load_world
from examples.control import pose_to_action
from examples.pickplace.env import PickPlaceEnv
from examples.pickplace.expert import ScriptedExpert
from examples.pickplace.record import RecordConfig, main

MISS = (0.02, 0.05)  # m beside the block
MISS_STEPS = 35  # control steps that it takes at most to get there and close


@dataclass(frozen=True)
class BlocksRecordConfig(RecordConfig):
    image_size: int = 128
    scene: str = str(WORLD_FILE)
    """Path of a world file."""
    split: str = "SO"
    misses: float = 0.3
    """Share of the episodes that begin where a grasp has missed."""

    def make_env(self) -> BlocksEnv:
        return BlocksEnv(self.split, self.image_size, load_world(Path(self.scene)), self.paraphrases)

    def check(self) -> None:
        load_world(Path(self.scene)).split(self.split)

    def begin(self, env: PickPlaceEnv, seed: list[int], index: int) -> None:
        env.reset_episode(seed, index)
        rng = np.random.default_rng([*seed, 0, 3])
        if rng.random() < self.misses:
            miss(env, rng)

    def settings(self) -> dict:
        return super().settings() | {"split": self.split, "misses": self.misses}


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


if __name__ == "__main__":
    main(BlocksRecordConfig, "examples.blocks.record")
