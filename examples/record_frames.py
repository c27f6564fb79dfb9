"""Frames of a recorded episode as an .npz, so that a client without this library can play them to the service.

python -m examples.record_frames EPISODE.h5 frames.npz --dataset-class PickPlaceCan
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from apt.infer.frames import frame_from_episode
from data_utils.config import DataConfig
from data_utils.datasets import get_dataset_class
from data_utils.h5io import Episode


def episode_arrays(path: Path, config: DataConfig, most: int | None = None) -> dict[str, np.ndarray]:
    """``timestamp`` (T,), ``ee_pose`` (T, Nee, 4, 4), ``gripper`` (T, Nee), and per camera ``NAME/color`` (T, H, W, 3)
    uint8 RGB, ``NAME/K`` (T, 3, 3) and ``NAME/wcT`` (T, 4, 4).

    Args:
        path: an episode file.
        config: which cameras and arms.
        most: T at most; None: all frames.
    Raises:
        DataError: a file that is no episode, or lacks a camera.
    """
    with Episode(path, config.cameras) as episode:
        frames = [frame_from_episode(episode, index, config) for index in range(len(episode))[:most]]
    arrays = {key: np.stack([frame[key] for frame in frames]) for key in ("timestamp", "ee_pose", "gripper")}
    for camera in config.cameras:
        arrays[f"{camera}/K"] = np.stack([frame[camera]["camera"]["K"] for frame in frames])
        for part in ("color", "wcT"):
            arrays[f"{camera}/{part}"] = np.stack([frame[camera]["data"][part] for frame in frames])
    return arrays


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("episode", type=Path)
    parser.add_argument("out", type=Path, help="the .npz")
    parser.add_argument("--dataset-class", required=True, help="whose cameras and arms (data_utils/datasets.py)")
    parser.add_argument("--frames", type=int, help="write so many at most")
    args = parser.parse_args(argv)
    try:
        if args.frames is not None and args.frames < 1:
            raise ValueError(f"--frames is {args.frames}; wanted 1 or more")
        config = get_dataset_class(args.dataset_class).config
        if not args.out.resolve().parent.is_dir():
            raise ValueError(f"there is no folder {args.out.parent} for {args.out.name}; make it first")
        arrays = episode_arrays(args.episode, config, args.frames)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    np.savez_compressed(args.out, **arrays)
    print(f"{args.out}: {len(arrays['timestamp'])} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
