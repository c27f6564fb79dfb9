"""The command ``python -m data_utils.index PATH``: build the index of a place, or bring it up to date."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import pyarrow.compute as pc

from data_utils.checks.checker import FileChecker
from data_utils.index.episode_index import EpisodeIndex
from data_utils.shards import Shard


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_utils.index", description="Build the index of a place of episodes, or bring it up to date."
    )
    parser.add_argument("path", help="folder (with its sub-folders), file, or quoted glob")
    parser.add_argument("--workers", type=int, help="checking processes (default: one per core, 16 at most)")
    parser.add_argument("--full", action="store_true", help="look at every file's size and time, not at folders' only")
    part = "check part I of N alone, 0/4 to 3/4 for instance; the same without it takes up all parts"
    parser.add_argument("--shard", metavar="I/N", help=part)
    options = parser.parse_args(argv)
    began = time.perf_counter()
    try:
        with FileChecker(options.workers) as checker:
            index = EpisodeIndex(options.path, checker, options.full, Shard.parse(options.shard))
    except ValueError as error:  # DataError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = index.episodes
    faults = Counter(rule for rule in rows["rule"].to_pylist() if rule)
    in_cameras = sum(bool(text) for text in rows["camera_faults"].to_pylist())
    count = f"{len(rows)} episode{'' if len(rows) == 1 else 's'}"
    which = "" if options.shard is None else f"part {options.shard} of "
    print(f"{count}, {pc.sum(rows['length']).as_py() or 0} frames in {which}{index.path}")
    print(f"{sum(faults.values())} cannot be used" + "".join(f"; {rule}: {n}" for rule, n in faults.most_common()))
    if in_cameras:
        print(f"{in_cameras} have a camera that cannot be used")
    if faults or in_cameras:
        print(f"they are left out of training; python -m data_utils.inspect {index.path} names every fault")
    print(f"{time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
