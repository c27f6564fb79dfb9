"""What a large set costs in hours and storage, from rates that are measured here on a small one.

    python benchmarks/large_set.py --episodes 100000 --nodes 8 --cores 64

Each step is run on two small sets by one process, and the difference of the two is what an episode takes. What so many
episodes take on all cores of so many machines follows: parts of a set do not wait for one another (``--shard``); the
network and the disks are not in it. How fast GPUs train is not measured: ``--samples-per-s`` takes what the first lines
of a run say.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file, as it is called

from benchmarks.episodes import FPS, make_episodes
from benchmarks.report import machine
from data_utils.datasets import PickPlaceCan

ROOT = Path(__file__).resolve().parents[1]
FEW, MANY = 4, 24  # episodes
READ_S = 5.0  # of reading samples
KEY_FRAMES = 10


@dataclass(frozen=True)
class Set:
    """Episodes in their ways to be stored."""

    recorded: Path
    """A folder of JPEG episodes."""
    exported: Path
    """The same as a LeRobot data set, its videos included."""


def command(module: str, *arguments: object) -> float:
    """Seconds that a command of this library takes."""
    words = [sys.executable, "-m", module, *map(str, arguments)]
    began = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stdout}{done.stderr}")
    return time.perf_counter() - began


def make_set(folder: Path, episodes: int, frames: int, side: int) -> Set:
    recorded = folder / "recorded"
    recorded.mkdir(parents=True)
    kinds = make_episodes(recorded, episodes, frames, side, KEY_FRAMES)
    for path in (*kinds["raw"], *kinds["video"], *recorded.glob("*.mp4")):
        path.unlink()
    command("data_utils.export", "--src", recorded, "--out", folder / "exported")
    return Set(recorded, folder / "exported")


def megabytes(folder: Path, pattern: str = "*") -> float:
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file()) / 1e6


def samples_per_s(recorded: Path) -> float:
    """Of one loader process, with augmentation, from files in the disk's cache."""
    paths = sorted(map(str, recorded.glob("*.h5")))
    dataset = PickPlaceCan(paths, config=PickPlaceCan.config, train=True)
    rng = np.random.default_rng(0)
    for index in range(len(paths)):
        dataset.sample(index, rng)
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < READ_S:
        dataset.sample(count % len(paths), rng)
        count += 1
    return count / (time.perf_counter() - began)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--episodes", type=int, default=100_000)
    add("--nodes", type=int, default=8, help="machines (default: %(default)s)")
    add("--cores", type=int, default=64, help="of each (default: %(default)s)")
    add("--gpus", type=int, default=8, help="of each (default: %(default)s)")
    add("--frames", type=int, default=200, help="of an episode (default: %(default)s)")
    add("--side", type=int, default=256, help="pixels of both cameras' square images (default: %(default)s)")
    add("--samples-per-s", type=float, help="of one GPU, as the first lines of a training say")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        sets = {count: make_set(Path(name) / str(count), count, args.frames, args.side) for count in (FEW, MANY)}

        def per_episode(run: Callable[[Set, Path], float]) -> float:
            taken = {count: run(made, Path(name) / f"out{count}_{id(run)}") for count, made in sets.items()}
            return max(1e-6, taken[MANY] - taken[FEW]) / (MANY - FEW)

        work = {
            "conversion (LeRobot, videos referred to)": lambda made, out: command(
                "data_utils.convert", "lerobot", "--src", made.exported, "--out", out, "--workers", 1
            ),
            "index": lambda made, out: command("data_utils.index", made.recorded, "--full", "--workers", 1),
            "inspection, every frame decoded": lambda made, out: command(
                "data_utils.inspect", made.recorded, "--frames", 0, "--workers", 1
            ),
        }
        seconds = {what: per_episode(run) for what, run in work.items()}
        rate = samples_per_s(sets[MANY].recorded)
        stored = megabytes(sets[MANY].recorded, "*.h5") / MANY, megabytes(sets[MANY].exported, "*.mp4") / MANY
    cores = args.nodes * args.cores
    print(f"{args.episodes} episodes of {args.frames} frames, two cameras of {args.side} pixels at {FPS} Hz;")
    print(f"{args.nodes} nodes of {args.cores} cores; measured with one process on {machine(torch.device('cpu'))}\n")
    print("| | one core, an episode | all | one core | all cores |\n|---|---|---|---|---|")
    for what, spent in seconds.items():
        hours = args.episodes * spent / 3600
        print(f"| {what} | {1000 * spent:.0f} ms | {args.episodes} | {hours:.1f} h | {60 * hours / cores:.1f} min |")
    for what, size in zip(("JPEGs in HDF5", "videos (H.264)"), stored, strict=True):
        print(f"| stored as {what} | {size:.2f} MB | {args.episodes * size / 1e6:.2f} TB | | |")
    fed = rate * args.cores / args.gpus
    print(f"\nA core reads {rate:.0f} augmented samples a second from JPEGs; {fed:.0f} for each of a node's GPUs.")
    frames = args.episodes * args.frames
    if args.samples_per_s is None:
        print(f"All {frames} frames once: {frames} / (samples/s of a GPU x {args.nodes * args.gpus}) seconds.")
    else:
        hours = frames / (args.samples_per_s * args.nodes * args.gpus) / 3600
        print(f"All {frames} frames once, at {args.samples_per_s:g} samples/s of a GPU: {hours:.2f} h.")


if __name__ == "__main__":
    main()
