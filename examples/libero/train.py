"""Trains a policy of one of LIBERO's suites on two CPU cores; examples/libero/train.sh sets everything up first.

    bash examples/libero/train.sh

Labelled pictures of the suite, a small VLM that has learned to point in them, demonstrations of the scripted expert, VA
prior, VLA on it, first with the VLM frozen and then with it, export, and closed loop from the stored states.
Stopped, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from apt.grounding.pairs import PAIRS_FILE
from examples.recipe import TUNING, WORKERS, Steps, Training, compiles, in_one_line, run
from examples.scene_parts import PER_PART

IMAGE_SIZE = 128  # that the small VLM sees
DATASET = "LiberoSmall"
PAIRS_SEED = 1000  # beyond that of the scenes: none twice
# Control steps between queries, queries that a trajectory is the mean of, denoising steps: as for blocks.
EXECUTION = ("--execute_steps", "4", "--ensemble", "2", "--denoising_steps", "10")


@dataclass(frozen=True)
class TrainLiberoConfig:
    out: Path = Path("libero_out")
    """Folder for everything; what is there already is not done again."""
    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10"] = "libero_object"
    """That is trained on and evaluated in."""
    scenes: int = 16250
    """Labelled pictures of both cameras; 250 of them are for judging alone."""
    pair_scenes: int = 2000
    """Others, that the VLM is asked about while it trains with the expert."""
    vision_steps: int | None = None
    """Training steps of the VLM's vision tower alone; None: as apt.grounding does."""
    vlm_steps: int | None = None
    """Training steps of the VLM after them; None: as apt.grounding does."""
    episodes: int = 50
    """Demonstrations of each task."""
    va_iter: int = 600
    """Training steps of stage 0, the VA prior."""
    vla_iter: int = 1500
    """Training steps of stage 1, the VLA, its VLM frozen."""
    tune_iter: int = 4800
    """Further steps in which the VLM trains too."""
    trials: int = 10
    """Episodes of each task in closed loop."""
    max_steps: str = "peers"
    """Control steps of an episode; peers: as published evaluations have it, 280 for libero_object."""
    seed: int = 0
    """Of pictures, demonstrations and training."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the expert in stage 1; auto: where there is a C++ compiler."""


def train(config: TrainLiberoConfig) -> None:
    out, steps = config.out.resolve(), Steps(7)
    compiled = ("--use_compile", str(compiles(config.compile)))
    workers = ("--workers", str(WORKERS))

    steps.begin("pictures of both cameras, with the names and places of what they show")
    for name, count, seed in (
        ("scenes", config.scenes, config.seed),
        ("pair_scenes", config.pair_scenes + PER_PART, config.seed + PAIRS_SEED),
    ):
        given = ("--suites", config.suite, "--scenes", str(count), "--seed", str(seed), *workers)
        run("examples.libero.scenes", "--out", str(out / name), *given, "--image_size", str(IMAGE_SIZE))
    steps.begin("the VLM")
    lengths = {"--vision-steps": config.vision_steps, "--steps": config.vlm_steps}
    length = [word for flag, count in lengths.items() if count is not None for word in (flag, str(count))]
    vlm = out / "vlm"
    run("apt.grounding", "--scenes", str(out / "scenes"), "--out", str(vlm), *length, "--seed", str(config.seed))
    if not (pairs := out / "pairs" / PAIRS_FILE).exists():
        run("apt.grounding.pairs", "--scenes", str(out / "pair_scenes"), "--out", str(pairs.parent))
    steps.begin("demonstrations of the scripted expert")
    given = ("--suite", config.suite, "--episodes", str(config.episodes), "--image_size", str(IMAGE_SIZE), *workers)
    run("examples.libero.record", *given, "--out", str(out / "demos"), "--seed", str(config.seed))

    training = Training(out, "blocks", DATASET, config.seed, vlm)
    training.locate([out / "demos"])
    steps.begin("stage 0: VA prior (language masked, VLM frozen)")
    training.export(training.train(0, "va", config.va_iter), out / "policy_va")
    steps.begin("stage 1: VLA (language in, VLM frozen)")
    frozen = training.train(1, "vla", config.vla_iter, "--va-name", "va", *compiled)
    steps.begin("stage 1: VLA, the VLM trained with it")
    tuning = (*TUNING, "--image_text_pairs", str(pairs))
    policy = training.export(
        training.finetune(frozen, "tuned", config.tune_iter, *tuning, *compiled), out / "policy_vla"
    )
    steps.begin("closed loop")
    given = ("--suites", config.suite, "--model_name", "small", "--ckpt", str(policy), *EXECUTION)
    given += ("--num_trials_per_task", str(config.trials), "--max_steps", config.max_steps)
    given += ("--image_size", str(IMAGE_SIZE), "--num_workers", str(WORKERS))
    roots = ("--save_root", str(out / "results"), "--video_root", str(out / "videos"))
    run("examples.libero.evaluate", *given, *roots)
    run("examples.libero.summary", str(out / "results"), "--out", str(out / "summary"))
    print(
        f"{policy}, in {steps.seconds:.0f} s; {out / 'summary/summary.md'} has the table, {out / 'videos'} the episodes"
    )


def main(argv: Sequence[str] | None = None) -> None:
    with in_one_line():
        train(tyro.cli(TrainLiberoConfig, args=argv, prog="bash examples/libero/train.sh", description=__doc__))


if __name__ == "__main__":
    main()
