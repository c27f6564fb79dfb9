"""From nothing to a policy that does what it could not do before; scripts/quickstart.sh sets everything up first.

    bash scripts/quickstart.sh

The shipped policy puts blocks into trays. Told to put one into the corner, for which it knows neither the word nor the
place, it fails. A hundred demonstrations and some minutes of fine-tuning later it is asked again, about blocks that
the demonstrations moved and about pairs of colour and shape that no demonstration, old or new, has shown.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from data_utils.files import write_text
from examples.blocks.evaluate import closing_line
from examples.blocks.recipe import Recipe
from examples.blocks.shipped import POLICY
from examples.recipe import Steps, in_one_line

WORLD = Path(__file__).with_name("corner.yaml")
SPLITS = ("SO", "UO")
FINETUNING = ("--max_lr", "2e-4", "--num_warmup", "20", "--eval_every", "150")
FROM_SCRATCH = ("--num_warmup", "20")


@dataclass(frozen=True)
class QuickstartConfig:
    out: Path = Path("quickstart_out")
    """Folder for everything; what is there already is not done again."""
    from_scratch: bool = False
    """Train both stages from random experts instead of fine-tuning the shipped policy."""
    episodes: int | None = None
    """Demonstrations to record (100; from scratch 250)."""
    va_iter: int = 400
    """Training steps of stage 0, from scratch alone."""
    vla_iter: int | None = None
    """Training steps of the VLA (450; from scratch 1600)."""
    trials: int = 20
    """Episodes in closed loop of each evaluation; before the training, half as many."""
    seed: int = 0
    """Of demonstrations and training."""


def quickstart(config: QuickstartConfig) -> None:
    out, scratch = config.out.resolve(), config.from_scratch
    episodes = config.episodes or (250 if scratch else 100)
    iterations = config.vla_iter or (1600 if scratch else 450)
    recipe, steps = Recipe(out, config.seed, WORLD), Steps(4)
    training = recipe.training

    steps.begin("before: the shipped policy is told to put blocks into the corner")
    before = recipe.evaluate("before", POLICY, "SO", max(1, config.trials // 2), video=True)
    steps.begin(f"{episodes} demonstrations of the scripted expert")
    recipe.record(episodes)
    if scratch:
        steps.begin("training both stages from random experts: VA prior, then VLA")
        training.train(0, "va", config.va_iter, *FROM_SCRATCH)
        runs, ckpt = ["va", "vla"], training.train(1, "vla", iterations, "--va-name", "va", *FROM_SCRATCH)
    else:
        steps.begin("fine-tuning the shipped policy")
        runs, ckpt = ["corner"], training.finetune(POLICY, "corner", iterations, *FINETUNING)
    steps.begin("after: in closed loop, as before, and with blocks that no demonstration moved")
    after = {
        split: recipe.evaluate(f"after_{split}", ckpt, split, config.trials, ema=True, video=True) for split in SPLITS
    }

    draw_curves(out, runs)
    choose_videos(out)
    seconds, reference = steps.seconds, reference_seconds()
    lines = [
        f"before   {closing_line('SO', before)}",
        *(f"after    {closing_line(split, summary)}" for split, summary in after.items()),
        f"in {seconds:.0f} s, {seconds / reference:.0f} times the reference computation of {reference:.2f} s "
        "(20 products of 2048 x 2048 float32 matrices on this machine)",
        "",
        f"In {out}:",
        "  before.mp4, after.mp4   the same episode, before and after; all of them in evaluation/",
        "  curves.png, logs/       losses and held-out errors; TensorBoard: tensorboard --logdir logs",
        f"  {ckpt.relative_to(out)}   the policy; python -m examples.blocks.evaluate --ckpt runs it",
        "  demos/                  the recorded episodes: python -m data_utils.inspect demos",
    ]
    write_text(out / "summary.txt", "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


def reference_seconds(products: int = 20, size: int = 2048) -> float:
    """What this machine takes for matrix products, on the cores that training uses."""
    import torch

    left, right = torch.ones(size, size), torch.ones(size, size)
    left @ right
    began = time.perf_counter()
    for _ in range(products):
        left @ right
    return time.perf_counter() - began


def draw_curves(out: Path, runs: list[str]) -> None:
    """``curves.png``: of each run, the loss on what it trained on and on what was held out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3.5), squeeze=False)
    for axis, name in zip(axes[0], runs, strict=True):
        rows = [json.loads(line) for line in (out / "logs" / name / "metrics.jsonl").read_text().splitlines()]
        for key, title, mark in (("loss/total", "training", "-"), ("eval/loss", "held out", "o-")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), mark, label=title)
        axis.set(title=name, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)
    plt.close(figure)


def choose_videos(out: Path) -> None:
    """``before.mp4`` and ``after.mp4``: an episode that fails before and succeeds after where there is one."""
    before, after = (_successes(out / "evaluation" / name) for name in ("before", "after_SO"))
    both = min(len(before), len(after))
    episode = int(np.argmax(after[:both].astype(int) - before[:both]))
    for name, folder in (("before", "before"), ("after", "after_SO")):
        shutil.copyfile(out / "evaluation" / folder / "videos" / f"episode_{episode:03d}.mp4", out / f"{name}.mp4")


def _successes(folder: Path) -> np.ndarray:
    """(N,) 0 or 1 per episode."""
    with open(folder / "episodes.csv", newline="", encoding="utf-8") as rows:
        return np.array([int(row["success"]) for row in csv.DictReader(rows)])


def main(argv: Sequence[str] | None = None) -> None:
    with in_one_line():
        quickstart(tyro.cli(QuickstartConfig, args=argv, prog="bash scripts/quickstart.sh", description=__doc__))


if __name__ == "__main__":
    main()
