"""Makes a small VLM of the world of blocks; examples/blocks/vlm.sh sets everything up first.

    bash examples/blocks/vlm.sh

Labelled pictures, then the training of docs/small_vlm.md. Stopped, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.recipe import Steps, in_one_line, run


@dataclass(frozen=True)
class MakeVLMConfig:
    out: Path = Path("blocks_vlm_out")
    """Folder for the pictures (``scenes``, 2 GB) and the model (``vlm``)."""
    scenes: int = 20250
    """Labelled scenes; 250 of them are for judging alone. In all of them blocks share a colour, and others a shape:
    telling these apart is what takes longest to learn."""
    vision_steps: int | None = None
    """Training steps of the vision tower alone; None: as apt.grounding does."""
    steps: int | None = None
    """Training steps after them; None: as apt.grounding does."""
    seed: int = 0
    workers: int = 2
    """Processes that render."""


def make(config: MakeVLMConfig) -> None:
    out, steps = config.out.resolve(), Steps(2)
    steps.begin("pictures of both cameras, with the names and places of what they show")
    scenes = ("--scenes", str(config.scenes), "--workers", str(config.workers), "--confusable", "1")
    run("examples.blocks.scenes", "--out", str(out / "scenes"), *scenes, "--seed", str(config.seed + 1))
    steps.begin("the model")
    folders = ("--scenes", str(out / "scenes"), "--out", str(out / "vlm"))
    lengths = {"--vision-steps": config.vision_steps, "--steps": config.steps}
    length = [word for flag, count in lengths.items() if count is not None for word in (flag, str(count))]
    run("apt.grounding", *folders, *length, "--seed", str(config.seed))
    print(f"{out / 'vlm'}, in {steps.seconds:.0f} s; its card is README.md, --vlm takes it")


def main(argv: Sequence[str] | None = None) -> None:
    with in_one_line():
        make(tyro.cli(MakeVLMConfig, args=argv, prog="bash examples/blocks/vlm.sh", description=__doc__))


if __name__ == "__main__":
    main()
