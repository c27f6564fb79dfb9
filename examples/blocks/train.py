"""Makes a policy of blocks as the shipped one was made; examples/blocks/train.sh sets everything up first.

    bash examples/blocks/train.sh

Demonstrations, VA prior, VLA on it, first with the VLM frozen and then with it, export, and closed loop in every split.
Stopped, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from examples.blocks.evaluate import closing_line
from examples.blocks.recipe import Recipe
from examples.blocks.world import load_world
from examples.recipe import TUNING, Steps, compiles, in_one_line


@dataclass(frozen=True)
class TrainBlocksConfig:
    out: Path = Path("blocks_out")
    """Folder for everything; what is there already is not done again."""
    episodes: int = 800
    """Demonstrations."""
    va_iter: int = 600
    """Training steps of stage 0, the VA prior."""
    vla_iter: int = 1500
    """Training steps of stage 1, the VLA, its VLM frozen."""
    tune_iter: int = 4800
    """Further steps in which the VLM trains too."""
    confusable: float = 0.9
    """Share of the demonstrations in which other blocks have the named one's colour and its shape; the world has 0.5
    of its episodes so."""
    pair_scenes: int = 2000
    """Rendered scenes that the VLM is asked about while it trains too."""
    trials: int = 100
    """Episodes in closed loop, of each split."""
    splits: tuple[str, ...] = ()
    """Splits to evaluate in; none named: all."""
    seed: int = 0
    """Of demonstrations and training."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the expert in stage 1: an eighth more samples per second, for two minutes of compilation each time. auto:
    where there is a C++ compiler."""


def train(config: TrainBlocksConfig) -> None:
    known = tuple(load_world().splits)
    if unknown := [split for split in config.splits if split not in known]:
        raise ValueError(f"--splits: there is no split {', '.join(unknown)}; choose from {', '.join(known)}")
    out, compiled = config.out.resolve(), ("--use_compile", str(compiles(config.compile)))
    recipe, steps = Recipe(out, config.seed), Steps(6)
    training = recipe.training
    steps.begin("demonstrations of the scripted expert")
    recipe.record(config.episodes, config.confusable)
    steps.begin("scenes to ask the VLM about")
    tuning = (*TUNING, "--image_text_pairs", str(recipe.write_pairs(config.pair_scenes)))
    steps.begin("stage 0: VA prior (language masked, VLM frozen)")
    training.export(training.train(0, "va", config.va_iter), out / "policy_va")
    steps.begin("stage 1: VLA (language in, VLM frozen)")
    frozen = training.train(1, "vla", config.vla_iter, "--va-name", "va", *compiled)
    steps.begin("stage 1: VLA, the VLM trained with it")
    tuned = training.finetune(frozen, "tuned", config.tune_iter, *tuning, *compiled)
    policy = training.export(tuned, out / "policy_vla")
    steps.begin("closed loop")
    found = {split: recipe.evaluate(split, policy, split, config.trials) for split in config.splits or known}
    print("", *(closing_line(split, summary) for split, summary in found.items()), sep="\n")
    print(f"{out / 'policy_va'} and {policy}, in {steps.seconds:.0f} s")


def main(argv: Sequence[str] | None = None) -> None:
    with in_one_line():
        train(tyro.cli(TrainBlocksConfig, args=argv, prog="bash examples/blocks/train.sh", description=__doc__))


if __name__ == "__main__":
    main()
