"""From demonstrations to a policy, in steps that are left alone where they are done already.

What a world's ``train.py`` is put together from. A training runs through scripts/train.sh's and finetune.sh's own
program, in a process of its own; what it was given is printed, to be copied.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_utils.data_loc import LOCATION_VARIABLE, episode_files
from data_utils.files import write_text
from examples.errors import SimulatorError

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = "ckpt_latest.pt"
WORKERS = 2  # simulators side by side
HELD_OUT = 10  # demonstrations to evaluate on, where that is neither more nor less of all than
MOST_HELD_OUT, LEAST_HELD_OUT = 0.5, 0.03
COMPILERS = ("g++", "clang++")  # one of which torch.compile wants
# Where the VLM trains too. Demonstrations name few things; beside them it goes on answering where things are.
TUNING = ("--vlm-mode", "full", "--vlm-lr", "3e-4", "--max_lr", "3e-4", "--num_warmup", "50", "--lm_loss_weight", "1")


class StepFailed(Exception):
    """A command ended badly; it has said why."""


@dataclass(frozen=True)
class Training:
    """One folder, in which everything is.

    Args:
        out: absolute; demonstrations, checkpoints, logs and exported policies come to lie in it.
        preset: what ``--config`` takes; dataset: name of the class of the demonstrations.
        seed: of training.
        vlm: what ``--vlm`` takes; None: the preset's.
    """

    out: Path
    preset: str
    dataset: str
    seed: int = 0
    vlm: Path | None = None

    def locate(self, folders: Sequence[Path]) -> None:
        """Where the demonstrations are; of the first, some are held out."""
        write_places(self._places, {self.dataset: [str(folder) for folder in folders]})

    def train(self, stage: int, name: str, iterations: int, *flags: str) -> Path:
        """Stage 0 (VA prior) or 1 (VLA) of a run; gone on with where it stopped, left alone where it is done. Returns
        its checkpoint."""
        kind, ckpt = ("va", "vla")[stage], self._run(name) / CHECKPOINT
        if steps_done(ckpt) >= iterations:
            return ckpt
        which = f"--{kind}-conti" if ckpt.exists() else f"--{kind}-name"
        return self._launch("train", name, iterations, "--stage", str(stage), which, name, *flags)

    def finetune(self, policy: Path, name: str, iterations: int, *flags: str) -> Path:
        """As :meth:`train`, from another policy."""
        if (self._run(name) / CHECKPOINT).exists():
            return self.train(1, name, iterations, *flags)
        return self._launch("finetune", name, iterations, "--pretrained-ckpt", str(policy), "--vla-name", name, *flags)

    @staticmethod
    def export(ckpt: Path, folder: Path) -> Path:
        """Averaged weights in half the bytes."""
        if not folder.is_dir():
            run("apt.infer.slim", str(ckpt), str(folder), "--ema", "--bf16")
        return folder

    @property
    def _places(self) -> Path:
        return self.out / "data_loc.yaml"

    def _run(self, name: str) -> Path:
        return self.out / "checkpoints" / name

    def _launch(self, command: str, name: str, iterations: int, *flags: str) -> Path:
        import torch

        # bfloat16 pays on a GPU and on CPUs that multiply in it.
        half = str(has_gpu() or torch.cpu._is_avx512_bf16_supported())
        gpus = "0" if has_gpu() else "cpu"
        first = yaml.safe_load(self._places.read_text(encoding="utf-8"))["default"][self.dataset][0]
        episodes = len(list(episode_files(first)))
        apart = f"{min(MOST_HELD_OUT, max(LEAST_HELD_OUT, HELD_OUT / max(1, episodes))):.3g}"
        where = ("--ckpt_dir", str(self.out / "checkpoints"), "--log_dir", str(self.out / "logs"))
        common = ("--config", self.preset, "--dataset_classes", self.dataset, "--gpus", gpus, "--fp16", half)
        vlm = () if self.vlm is None else ("--vlm", str(self.vlm))
        length = ("--max-iter", str(iterations), "--num_decay", str(iterations * 4 // 5))
        given = (*common, "--seed", str(self.seed), *vlm, *length, "--eval_split", apart, *where, *flags)
        run("apt.training.launch", command, *given, **{LOCATION_VARIABLE: str(self._places)})
        return self._run(name) / CHECKPOINT


def write_places(file: Path, places: Mapping[str, str | Sequence[str]]) -> None:
    """The YAML file that says where data sets are, for ``APT_DATA_LOC``."""
    write_text(file, yaml.safe_dump({"default": dict(places)}))


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


def steps_done(ckpt: Path) -> int:
    """Training steps behind a checkpoint; 0 where there is none."""
    from apt.checkpoint import load_checkpoint  # and torch: not for --help

    return load_checkpoint(ckpt)["current_iters"] if ckpt.exists() else 0


def compiles(asked: str) -> bool:
    """Whether to compile the expert: as ``asked``, "yes" or "no", or "auto", where there is a C++ compiler."""
    if asked != "auto":
        return asked == "yes"
    there = any(map(shutil.which, COMPILERS))
    if not there:
        print(f"no C++ compiler is here ({' or '.join(COMPILERS)}): the expert is not compiled, and trains slower")
    return there


def has_gpu() -> bool:
    import torch  # not for --help

    return torch.cuda.is_available()
