"""What ``train.py`` and ``quickstart.py`` of blocks are put together from: demonstrations, questions, episodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from apt.grounding.pairs import PAIRS_FILE, PairsConfig, write_pairs
from examples.blocks.evaluate import BlocksEvaluateConfig, closing_line
from examples.blocks.record import BlocksRecordConfig
from examples.blocks.scenes import ScenesConfig, render
from examples.blocks.world import WORLD_FILE
from examples.pickplace.evaluate import evaluate
from examples.pickplace.record import record
from examples.recipe import WORKERS, Training, has_gpu
from examples.scene_parts import PER_PART

PAIRS_SEED = 1  # of scenes that no VLM is judged on


@dataclass(frozen=True)
class Recipe:
    """One folder, in which everything is; each step is left alone where it is done already.

    Args:
        out: absolute.
        seed: of demonstrations and training.
        world: file of the world.
    """

    out: Path
    seed: int = 0
    world: Path = WORLD_FILE

    @property
    def training(self) -> Training:
        return Training(self.out, "blocks", "Blocks", self.seed)

    def record(self, episodes: int, confusable: float | None = None) -> None:
        """Demonstrations of the scripted expert, and where training finds them.

        ``confusable``: share of them in which other blocks have the named one's colour and its shape; None: the
        world's.
        """
        demos, scene = self.out / "demos", str(self.world)
        record(BlocksRecordConfig(demos, episodes, self.seed, WORKERS, scene=scene, confusable=confusable))
        self.training.locate([demos])

    def write_pairs(self, scenes: int) -> Path:
        """Image-text pairs that ask where things are, about scenes of things that are alike; returns their file."""
        rendered, pairs = self.out / "scenes", self.out / "pairs"
        if not (pairs / PAIRS_FILE).exists():
            # A part more: the first is for judging alone.
            config = ScenesConfig(rendered, scenes + PER_PART, PAIRS_SEED, WORKERS, confusable=1.0)
            render(config)
            write_pairs(PairsConfig(rendered, pairs))
        return pairs / PAIRS_FILE

    def evaluate(
        self, name: str, ckpt: Path, split: str, episodes: int, ema: bool = False, video: bool = False
    ) -> dict:
        """In closed loop, into ``evaluation/<name>``; prints and returns the summary."""
        config = BlocksEvaluateConfig(
            self.out / "evaluation" / name,
            ckpt=ckpt,
            split=split,
            episodes=episodes,
            seed=7,
            workers=WORKERS,
            ema=ema,
            video=video,
            world=self.world,
            device="cuda" if has_gpu() else "cpu",
        )
        summary = evaluate(config)
        print(closing_line(split, summary), flush=True)
        return summary
