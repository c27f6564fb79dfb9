"""Samples per second of one core: two 256x256 JPEG cameras, episode files to uint8 samples.

    python benchmarks/loader.py [--seconds 4] [--episodes 12] [--frames 150]

Episodes are made here, in a temporary folder. The baseline is the straightforward reader: it opens the file for every
sample, reads the whole arrays, interpolates one time step after another, and makes float32 images and per-pixel
coordinate maps. Every row draws the same frames in one process and one thread; best of several rounds, as the machine
may be shared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
from scipy.spatial.transform import Rotation, Slerp

ROOT = Path(__file__).resolve().parent.parent
CAMERAS = ("e2h_cam", "eih_cam")
SIDE = 256
ROUNDS = 3


def make_episodes(folder: Path, episodes: int, frames: int) -> list[Path]:
    """Write episodes whose frames look like a scene to a JPEG coder: shaded ground, textured boxes, some noise."""
    from data_utils.h5io import EpisodeWriter

    rng = np.random.default_rng(0)
    ground = cv2.resize(rng.integers(60, 200, (6, 6, 3), dtype=np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    ground = cv2.add(ground, rng.integers(0, 12, ground.shape, dtype=np.uint8))
    K = np.array([[220.0, 0.0, 127.5], [0.0, 220.0, 127.5], [0.0, 0.0, 1.0]])
    paths = []
    for episode in range(episodes):
        boxes = [(rng.integers(0, SIDE - 60, 2), rng.integers(20, 60, 2), rng.integers(0, 255, 3)) for _ in range(8)]
        path = folder / f"{episode:04d}.h5"
        with EpisodeWriter(path, CAMERAS, 1, "pick up the can") as writer:
            for t in range(frames):
                image = ground.copy()
                for (y, x), (h, w), color in boxes:
                    image[y : y + h, (x + t) % (SIDE - 60) :][:, :w] = color
                pose = np.eye(4)
                pose[:3, :3] = Rotation.from_rotvec([0.01 * t, 0.02 * t, 0.0]).as_matrix()
                pose[0, 3] = 0.001 * t
                writer.add_frame(
                    float(t),
                    pose[None],
                    np.array([0.5]),
                    dict.fromkeys(CAMERAS, image),
                    dict.fromkeys(CAMERAS, np.eye(4)),
                    dict.fromkeys(CAMERAS, K),
                )
        paths.append(path)
    return paths


def naive_sample(path: Path, frame: int, num_future: int) -> dict[str, np.ndarray]:
    """The baseline's sample: the same content as the dictionary form, made the straightforward way."""
    with h5py.File(path, "r") as file:
        times, poses, gripper = file["timestamp"][:], file["ee_pose"][:], file["gripper"][:]
        images, maps, extrinsics = [], [], []
        for camera in CAMERAS:
            rgb = cv2.cvtColor(cv2.imdecode(file[f"{camera}/rgb"][frame], cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            K = file[f"{camera}/K"][:]
            images.append(rgb.transpose(2, 0, 1).astype(np.float32) / 255.0)
            u, v = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
            maps.append(np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1]]).astype(np.float32))
            extrinsics.append(file[f"{camera}/pose"][:][frame])
    states = []
    for step in range(num_future + 1):
        now = min(times[frame] + step, times[-1])
        before = min(np.searchsorted(times, now, side="right") - 1, len(times) - 2)
        fraction = (now - times[before]) / (times[before + 1] - times[before])
        pair = slice(before, before + 2)
        pose = np.eye(4)
        pose[:3, :3] = Slerp([0.0, 1.0], Rotation.from_matrix(poses[pair, 0, :3, :3]))(fraction).as_matrix()
        pose[:3, 3] = (1 - fraction) * poses[before, 0, :3, 3] + fraction * poses[before + 1, 0, :3, 3]
        openness = (1 - fraction) * gripper[before] + fraction * gripper[before + 1]
        states.append(np.concatenate([pose.reshape(16), openness]).astype(np.float32))
    return {
        "obs_rgbs": np.stack(images)[None],
        "obs_norm_xys": np.stack(maps)[None],
        "obs_extrinsics": np.stack(extrinsics)[None],
        "states": np.stack(states),
    }


def rate(draw: Callable[[int], object], seconds: float) -> float:
    """Calls per second of process time, best of the rounds."""
    best = 0.0
    for _ in range(ROUNDS):
        count, start = 0, time.process_time()
        while (elapsed := time.process_time() - start) < seconds / ROUNDS:
            draw(count)
            count += 1
        best = max(best, count / elapsed)
    return best


def main() -> None:
    from data_utils.collate import Collator
    from data_utils.dataset_base import sample_to_dict
    from data_utils.datasets import PickPlaceCan
    from data_utils.types import TokenizedPrompt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="process time spent on each row")
    parser.add_argument("--episodes", type=int, default=12)
    parser.add_argument("--frames", type=int, default=150)
    options = parser.parse_args()
    cv2.setNumThreads(0)

    with tempfile.TemporaryDirectory() as folder:
        paths = make_episodes(Path(folder), options.episodes, options.frames)
        size = sum(path.stat().st_size for path in paths) / (len(paths) * options.frames * len(CAMERAS))
        plain, augmented = PickPlaceCan(paths, train=False), PickPlaceCan(paths, train=True)
        reopening = PickPlaceCan(paths, train=False)
        reopening.max_open_episodes = 1
        order = np.random.default_rng(1).integers(0, [len(paths), options.frames], (4096, 2)).tolist()
        tokens = TokenizedPrompt(np.arange(160), np.zeros((3, 160), np.int64))
        collate = Collator(lambda prompt, cameras: tokens, 0, plain.config.num_cameras, plain.config.num_arms)

        def draw(dataset: PickPlaceCan, number: int):
            episode, frame = order[number % len(order)]
            return dataset.sample(episode, np.random.default_rng(number), frame)

        def naive(number: int):
            episode, frame = order[number % len(order)]
            return naive_sample(paths[episode], frame, plain.config.num_future)

        for number in range(len(paths)):
            draw(plain, number)
        batch = [draw(plain, number) for number in range(32)]
        rows = [
            ("baseline: reopen, per-step interpolation, float32 maps", rate(naive, options.seconds)),
            (
                "dictionary form (float32 images, coordinate maps)",
                rate(lambda n: sample_to_dict(draw(plain, n)), options.seconds),
            ),
            ("sample, no augmentation", rate(lambda n: draw(plain, n), options.seconds)),
            ("sample, crop + colour + blur", rate(lambda n: draw(augmented, n), options.seconds)),
            ("sample, no augmentation, a new file each time", rate(lambda n: draw(reopening, n), options.seconds)),
            ("collate, batches of 32", 32 * rate(lambda n: collate(batch), options.seconds)),
        ]
    print(f"two {SIDE}x{SIDE} JPEG cameras, {size / 1024:.1f} KiB per frame, one process, one thread\n")
    print(f"{'':<56}{'samples/s per core':>20}{'x baseline':>12}")
    for name, value in rows:
        print(f"{name:<56}{value:>20.0f}{value / rows[0][1]:>12.1f}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
