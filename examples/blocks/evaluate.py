"""Does a policy put the block that is named into the tray that is named? In closed loop, by split.

    python -m examples.blocks.evaluate --split SO --episodes 20 --seed 7 --out results/blocks

Of the shipped policy where no --ckpt is given. Results are written as ``examples.pickplace.evaluate`` writes them;
stopped, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.blocks.env import BlocksEnv
from examples.blocks.shipped import DENOISING_STEPS, ENSEMBLE, EXECUTE_STEPS, POLICY, SETTLE_STEPS
from examples.blocks.world import WORLD_FILE, load_world
from examples.errors import SimulatorError
from examples.pickplace.evaluate import ClosedLoopConfig, evaluate


@dataclass(frozen=True)
class BlocksEvaluateConfig(ClosedLoopConfig):
    split: str = "SO"
    """What is unseen: SO nothing, UO the object, UC the tray's colour, UE the environment, UOUE object and environment,
    UI the instruction's wording."""
    ckpt: Path | None = POLICY
    """Checkpoint of the model, a run's .pt or an exported folder; the shipped policy where none is given."""
    image_size: int = 128
    max_steps: int = 110
    execute_steps: int = EXECUTE_STEPS
    settle_steps: int = SETTLE_STEPS
    ensemble: int = ENSEMBLE
    denoising_steps: int | None = DENOISING_STEPS
    world: Path = WORLD_FILE

    def make_env(self) -> BlocksEnv:
        return BlocksEnv(self.split, self.image_size, load_world(self.world))


def closing_line(split: str, summary: dict) -> str:
    """``SO success 18/20 (70 to 97%), named object first 20/20``"""
    episodes, success, named = summary["episodes"], summary["success"], summary["approached_named"]
    low, high = success["interval"]
    return (
        f"{split} success {success['count']}/{episodes} ({100 * low:.0f} to {100 * high:.0f}%), "
        f"named object first {named['count']}/{episodes}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(BlocksEvaluateConfig, args=argv, prog="python -m examples.blocks.evaluate")
    try:
        print(closing_line(config.split, evaluate(config)))
    except (ValueError, FileNotFoundError, ImportError, SimulatorError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
