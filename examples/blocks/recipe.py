"""The steps from nothing to a policy of blocks, each left alone where it is done already.

What ``train.py`` and ``quickstart.py`` are put together from. A training runs through scripts/train.sh's and
finetune.sh's own program, in a process of its own; what it was given is printed, to be copied.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apt.grounding.pairs import PAIRS_FILE, PairsConfig, write_pairs
from data_utils.files import write_text
from examples.blocks.evaluate import BlocksEvaluateConfig, closing_line
from examples.blocks.record import BlocksRecordConfig
from examples.blocks.scenes import PER_PART, ScenesConfig, render
from examples.blocks.world import WORLD_FILE
from examples.errors import SimulatorError
from examples.pickplace.evaluate import evaluate
from examples.pickplace.record import record

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = "ckpt_latest.pt"
PAIRS_SEED = 1  # of scenes that no VLM is judged on
WORKERS = 2  # simulators side by side
HELD_OUT = 10  # demonstrations to evaluate on, where that is neither more nor less of all than
MOST_HELD_OUT, LEAST_HELD_OUT = 0.5, 0.03


class StepFailed(Exception):
    """A command ended badly; it has said why."""


@dataclass(frozen=True)
class Recipe:
    """One folder, in which everything is.

    Args:
        out: absolute; ``demos``, ``checkpoints``, ``logs``, ``evaluation`` and exported policies come to lie in it.
        seed: of demonstrations and training.
        world: file of the world.
    """

    out: Path
    seed: int = 0
    world: Path = WORLD_FILE

    def record(self, episodes: int, confusable: float | None = None) -> None:
        """Demonstrations of the scripted expert, and where training finds them.

        ``confusable``: share of them in which other blocks have the named one's colour and its shape; None: the
        world's.
        """
        demos, scene = self.out / "demos", str(self.world)
        record(BlocksRecordConfig(demos, episodes, self.seed, WORKERS, scene=scene, confusable=confusable))
        write_text(self._places, f'default:\n  Blocks: "{demos}"\n')

    def write_pairs(self, scenes: int) -> Path:
        """Image-text pairs that ask where things are, about scenes of things that are alike; returns their file."""
        rendered, pairs = self.out / "scenes", self.out / "pairs"
        if not (pairs / PAIRS_FILE).exists():
            # A part more: the first is for judging alone.
            config = ScenesConfig(rendered, scenes + PER_PART, PAIRS_SEED, WORKERS, confusable=1.0)
            render(config)
            write_pairs(PairsConfig(rendered, pairs))
        return pairs / PAIRS_FILE

    def train(self, stage: int, name: str, iterations: int, *flags: str) -> Path:
        """Stage 0 (VA prior) or 1 (VLA) of a run; gone on with where it stopped, left alone where it is done. Returns
        its checkpoint."""
        kind, ckpt = ("va", "vla")[stage], self._run(name) / CHECKPOINT
        if self._steps_done(ckpt) >= iterations:
            return ckpt
        which = f"--{kind}-conti" if ckpt.exists() else f"--{kind}-name"
        return self._launch("train", name, iterations, "--stage", str(stage), which, name, *flags)

    def finetune(self, policy: Path, name: str, iterations: int, *flags: str) -> Path:
        """As :meth:`train`, from another policy."""
        if (self._run(name) / CHECKPOINT).exists():
            return self.train(1, name, iterations, *flags)
        return self._launch("finetune", name, iterations, "--pretrained-ckpt", str(policy), "--vla-name", name, *flags)

    def export(self, ckpt: Path, folder: Path) -> Path:
        """Averaged weights in half the bytes."""
        if not folder.is_dir():
            run("apt.infer.slim", str(ckpt), str(folder), "--ema", "--bf16")
        return folder

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
            device="cuda" if _has_gpu() else "cpu",
        )
        summary = evaluate(config)
        print(closing_line(split, summary), flush=True)
        return summary

    @property
    def _places(self) -> Path:
        return self.out / "data_loc.yaml"

    @staticmethod
    def _steps_done(ckpt: Path) -> int:
        from apt.checkpoint import load_checkpoint  # and torch: not for --help

        return load_checkpoint(ckpt)["current_iters"] if ckpt.exists() else 0

    def _run(self, name: str) -> Path:
        return self.out / "checkpoints" / name

    def _launch(self, command: str, name: str, iterations: int, *flags: str) -> Path:
        import torch

        # bfloat16 pays on a GPU and on CPUs that multiply in it.
        half = str(_has_gpu() or torch.cpu._is_avx512_bf16_supported())
        gpus = "0" if _has_gpu() else "cpu"
        episodes = len(list((self.out / "demos").glob("*.hdf5")))
        apart = f"{min(MOST_HELD_OUT, max(LEAST_HELD_OUT, HELD_OUT / max(1, episodes))):.3g}"
        where = ("--ckpt_dir", str(self.out / "checkpoints"), "--log_dir", str(self.out / "logs"))
        common = ("--config", "blocks", "--gpus", gpus, "--fp16", half, "--seed", str(self.seed))
        length = ("--max-iter", str(iterations), "--num_decay", str(iterations * 4 // 5))
        held_out = ("--eval_split", apart)
        run("apt.training.launch", command, *common, *length, *held_out, *where, *flags, APT_DATA_LOC=str(self._places))
        return self._run(name) / CHECKPOINT


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Context in which what ends a command, a mistake or Ctrl-C, ends it in one line."""
    try:
        yield
    except (ValueError, OSError, ImportError, SimulatorError, StepFailed) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None


class Steps:
    """Headings with the time that has passed."""

    def __init__(self, count: int) -> None:
        self._count, self._number, self._started = count, 0, time.monotonic()

    def begin(self, what: str) -> None:
        self._number += 1
        print(f"\n== {self._number}/{self._count} {what} ({self.seconds:.0f} s)", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started


def run(module: str, *arguments: str, **environment: str) -> None:
    """``python -m module arguments`` from the repository. Raises :class:`StepFailed`."""
    given = " ".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
    print(f"$ {given}python -m {module} {shlex.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT, env=os.environ | environment)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it got the signal too, and saves
        raise
    if status:
        raise StepFailed(f"python -m {module} ended with status {status}; the same command goes on from there")


def _has_gpu() -> bool:
    import torch  # not for --help

    return torch.cuda.is_available()
