"""How long does conversion take, beside an earlier revision of this repository?

    python benchmarks/convert.py [--baseline REVISION]

One LeRobot v3.0 dataset (two cameras, H.264) is converted by the baseline and by these files in turn, a few times each,
by one process. The whole command counts, start and all; ratios are medians over the baseline's. The default
baseline is the last revision before rows were paired with frames by time, columns checked row by row, cameras judged
and sources recorded. Needs git and the repository's history.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file, as it is called

from benchmarks.episodes import make_episodes
from benchmarks.report import machine

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "22fe464"


def dataset(folder: Path, episodes: int, frames: int) -> Path:
    """An exported dataset of so many episodes."""
    recorded = folder / "recorded"
    recorded.mkdir()
    kinds = make_episodes(recorded, episodes, frames, 96, 2)
    for path in (*kinds["raw"], *kinds["video"]):
        path.unlink()
    exported = folder / "exported"
    _run(ROOT, "data_utils.export", "--src", recorded, "--out", exported)
    return exported


def seconds(code: Path, source: Path, out: Path) -> float:
    """Of one conversion by the revision in ``code``, into a folder that is not there."""
    began = time.perf_counter()
    _run(code, "data_utils.convert", "lerobot", "--src", source, "--out", out, "--workers", 1)
    return time.perf_counter() - began


def _run(code: Path, module: str, *arguments: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(code)}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {code}: {done.stderr}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", default=BASELINE, help="git revision to compare with (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--frames", type=int, default=300, help="rows per episode (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = folder / "before"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", before, args.baseline], check=True)
        try:
            source = dataset(folder, args.episodes, args.frames)
            taken: dict[str, list[float]] = {"baseline": [], "these files": []}
            for repeat in range(args.repeats + 1):
                for which, code in (("baseline", before), ("these files", ROOT)):
                    spent = seconds(code, source, folder / f"{which} {repeat}")
                    if repeat:  # the first fills the disk's cache
                        taken[which].append(spent)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", before], check=True)
    rows = args.episodes * args.frames
    what = f"{args.episodes} episodes, {rows} rows, two cameras"
    print(f"{what}; {machine(torch.device('cpu'))}; baseline {args.baseline}\n")
    print("| | seconds | range | rows/s | seconds over baseline's |\n|---|---|---|---|---|")
    for which, spent in taken.items():
        median, ratio = statistics.median(spent), statistics.median(spent) / statistics.median(taken["baseline"])
        print(f"| {which} | {median:.2f} | {min(spent):.2f}-{max(spent):.2f} | {rows / median:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
