"""Makes a small VLM of the world of blocks; examples/blocks/vlm.sh sets everything up first.

    bash examples/blocks/vlm.sh

Labelled pictures, then the training of docs/small_vlm.md. Stopped, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.blocks.recipe import Steps, in_one_line, run


@dataclass(frozen=True)
class MakeVLMConfig:
    out: Path = Path("blocks_vlm_out")
    """Folder for the pictures (``scenes``, 1.4 GB) and the model (``vlm``)."""
    scenes: int = 14250
    """Labelled scenes; 250 of them are for judging alone."""
    steps: int | None = None
    """Training steps; None: as apt.grounding does."""
    seed: int = 0
    workers: int = 2
    """Processes that render."""


def make(config: MakeVLMConfig) -> None:
    out, steps = config.out.resolve(), Steps(2)
    seed = ("--seed", str(config.seed))
    steps.begin("pictures of both cameras, with the names and places of what they show")
    scenes = ("--scenes", str(config.scenes), "--workers", str(config.workers))
    run("examples.blocks.scenes", "--out", str(out / "scenes"), *scenes, *seed)
    steps.begin("the model")
    length = () if config.steps is None else ("--steps", str(config.steps))
    run("apt.grounding", "--scenes", str(out / "scenes"), "--out", str(out / "vlm"), *length, *seed)
    print(f"{out / 'vlm'}, in {steps.seconds:.0f} s; its card is README.md, --vlm takes it")


def main(argv: Sequence[str] | None = None) -> None:
    with in_one_line():
        make(tyro.cli(MakeVLMConfig, args=argv, prog="bash examples/blocks/vlm.sh", description=__doc__))


if __name__ == "__main__":
    main()
