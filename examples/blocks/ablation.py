"""What an ablation's cell is worth in the world of blocks; see ``examples/pickplace/ablation.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apt.ablation.evaluation import EvaluationRequest
from examples.blocks.evaluate import BlocksEvaluateConfig
from examples.blocks.world import load_world
from examples.pickplace.ablation import Judge
from examples.pickplace.evaluate import ClosedLoopConfig
from examples.pickplace.record import RecordedEpisode

SPLITS = ("SO", "UO")


def evaluate_policy(request: EvaluationRequest) -> dict[str, float]:
    """:meth:`Judge.in_closed_loop`, of blocks that demonstrations moved and of pairs that no demonstration shows."""
    return BlocksJudge(request).in_closed_loop()


def evaluate_open_loop(request: EvaluationRequest) -> dict[str, float]:
    """:meth:`Judge.against_recordings`; needs no simulator."""
    return BlocksJudge(request).against_recordings()


class BlocksJudge(Judge):
    """Of policies that were trained on a world of ``examples/blocks``."""

    def __init__(self, request: EvaluationRequest) -> None:
        super().__init__(request)
        self._world_file = Path(self.recording["scene"])
        self._world = load_world(self._world_file)

    def settings(self) -> Sequence[str]:
        return SPLITS

    def closed_loop(self, setting: str, common: dict) -> ClosedLoopConfig:
        return BlocksEvaluateConfig(split=setting, world=self._world_file, **common)

    def instructions(self, episode: RecordedEpisode) -> tuple[str, list[str]]:
        split = self._world.split(self.recording["split"])
        layout = self._world.draw(np.random.default_rng(episode.seed), split)  # as the episode drew it
        own = layout.instructions[0]
        return own, [own.replace(str(layout.blocks[0]), str(other)) for other in layout.blocks[1:]]
