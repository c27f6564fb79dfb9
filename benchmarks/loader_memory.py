"""Memory of loader workers over a long run: it must not grow with the samples drawn or the files seen.

    python benchmarks/loader_memory.py [--episodes 5000] [--samples 20000] [--workers 2]

Tiny two-camera episodes are made in a temporary folder: a few files, hard-linked under many names, as a reader cannot
tell. Every sample opens a file that it has most likely closed since. RSS counts pages shared with the main process in
full, PSS by its share; growth shows in both.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CAMERAS = ("e2h_cam", "eih_cam")
SIDE, FRAMES, FILES = 96, 40, 20
BATCH = 20


def make_episodes(folder: Path, count: int) -> list[Path]:
    """``count`` paths of FILES different episodes."""
    from data_utils.h5io import CameraData, EpisodeData, write_episode

    rng = np.random.default_rng(0)
    K = np.array([[SIDE, 0, SIDE / 2], [0, SIDE, SIDE / 2], [0, 0, 1.0]])
    for number in range(FILES):
        images = rng.integers(0, 255, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
        data = EpisodeData(
            timestamp=np.arange(FRAMES, dtype=float),
            world_from_ee=np.tile(np.eye(4), (FRAMES, 1, 1, 1)),
            gripper=np.zeros((FRAMES, 1)),
            prompts=["reach for the square"],
            cameras={camera: CameraData(np.eye(4), K, list(images)) for camera in CAMERAS},
        )
        write_episode(folder / f".{number}.h5", data)
    paths = []
    for number in range(count):
        (folder / f"{number // 1000:03d}").mkdir(exist_ok=True)
        paths.append(folder / f"{number // 1000:03d}" / f"{number:05d}.h5")
        os.link(folder / f".{number % FILES}.h5", paths[-1])
    return paths


def memory(pid: int) -> tuple[float, float]:
    """(RSS, PSS) of a process in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return tuple(int(re.search(rf"^{name}:\s+(\d+) kB", text, re.M)[1]) / 1024 for name in ("Rss", "Pss"))


def main() -> None:
    from data_utils.batches.loader import build_loader
    from data_utils.batches.options import LoaderOptions
    from data_utils.datasets import PickPlaceCan
    from data_utils.types import TokenizedPrompt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=5000)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        dataset = PickPlaceCan(make_episodes(Path(folder), options.episodes))
        tokens = TokenizedPrompt(np.arange(160), np.zeros((3, 160), np.int64))
        loading = LoaderOptions(
            batch_size=BATCH,
            workers=options.workers,
            multiplex=-(-options.samples // options.episodes),
            persistent_workers=True,
            timeout=300,
        )
        loader, _ = build_loader([dataset], loading, tokenize=lambda prompt, cameras: tokens, pad_id=0)
        print(f"{options.episodes} episodes, {options.workers} workers\n")
        print(f"{'samples':>8}  " + "  ".join(f"{f'worker {w} RSS, PSS (MiB)':>26}" for w in range(options.workers)))
        began, every = time.perf_counter(), options.samples // 4
        for number, _ in enumerate(loader):
            if number * BATCH % every == 0:
                print_row(number * BATCH, loader.worker_pids)
        print_row(options.samples, loader.worker_pids)
        print(f"\n{options.samples / (time.perf_counter() - began):.0f} samples/s")


def print_row(samples: int, pids: list[int]) -> None:
    cells = "  ".join("{:>17.1f}{:>9.1f}".format(*memory(pid)) for pid in pids)
    print(f"{samples:>8}  {cells}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
