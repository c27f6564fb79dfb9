"""Samples per second: episode files to uint8 samples, against the straightforward loader and against bare decoding.

    python benchmarks/loader.py [--seconds 4] [--episodes 12] [--frames 150] [--key-frames 2] [--size 256]

Episodes with two cameras are made here, in a temporary folder: the same frames as JPEGs, as raw arrays and as H.264
videos. All rows draw the same frames. The first two tables count the process time of one process and one thread, best
of several rounds, as the machine may be shared; *bare decoding* is the decoder alone on the same frames, without files
where that is possible. The last one is wall-clock time through PyTorch's DataLoader with 1 and 2 workers.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.episodes import CAMERAS, make_episodes
from benchmarks.naive_loader import NaiveDataset
from data_utils.batches.collate import Collator
from data_utils.batches.loader import build_loader
from data_utils.batches.options import LoaderOptions
from data_utils.config import DataConfig
from data_utils.samples.dataset import H5DatasetMapBase, sample_to_dict
from data_utils.types import TokenizedPrompt
from data_utils.video import READERS, open_video

ROUNDS = 3
BATCH = 32


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


def wall_rate(loader, batches: int) -> float:
    """Samples per second of wall-clock time once the workers have started and filled their queues."""
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return batches * BATCH / (time.perf_counter() - start)


class Benchmark:
    """Draws the same frames by every way of reading them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.seconds = options.seconds
        self.paths = make_episodes(folder, options.episodes, options.frames, options.size, options.key_frames)
        self.config = DataConfig(
            cameras=CAMERAS, wrist_cameras=CAMERAS[1:], sample_dt=1.0, image_hw=(options.size, options.size)
        )
        self.order = np.random.default_rng(1).integers(0, [options.episodes, options.frames], (8192, 2))
        self.naive = {kind: self._naive(kind) for kind in ("jpeg", "video")}

    def _naive(self, kind: str) -> NaiveDataset:
        return NaiveDataset(self.paths[kind], CAMERAS, self.config.num_future, self.order)

    def dataset(self, kind: str, train: bool = False, **options) -> H5DatasetMapBase:
        return H5DatasetMapBase(self.paths[kind], self.config, train=train, **options)

    def sampling(self, dataset: H5DatasetMapBase) -> float:
        """Samples per second, files and decoders open."""

        def draw(number: int):
            episode, frame = self.order[number % len(self.order)].tolist()
            return dataset.sample(episode, np.random.default_rng(number), frame)

        for number in range(200):
            draw(number)
        return rate(draw, self.seconds)

    def bare_jpeg(self) -> float:
        """Decoding the two JPEGs of a sample, bytes in memory."""
        stored = []
        for episode, frame in self.order[:500].tolist():
            with h5py.File(self.paths["jpeg"][episode]) as file:
                stored.append([file[f"{camera}/rgb"][frame] for camera in CAMERAS])
        return rate(lambda n: [cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB) for jpeg in stored[n % 500]], self.seconds)

    def bare_video(self, reader: str) -> float:
        """Decoding two random frames of one open video: several open decord decoders would slow each other down."""
        video = open_video(self.paths["video"][0].parent / f"0000_{CAMERAS[0]}.mp4", reader)
        frames = self.order % len(video)
        return rate(lambda n: [video.read(int(frame)) for frame in frames[n % len(frames)]], self.seconds)

    def bare_raw(self) -> float:
        """Copying the two frames of a sample from open files into (H, W, 3)."""
        files = [h5py.File(path) for path in self.paths["raw"]]

        def draw(number: int):
            episode, frame = self.order[number % len(self.order)].tolist()
            return [np.ascontiguousarray(files[episode][f"{c}/rgb"][frame].transpose(1, 2, 0)) for c in CAMERAS]

        return rate(draw, self.seconds)

    def one_core(self) -> None:
        jpeg = self.dataset("jpeg")
        reopening = self.dataset("jpeg")
        reopening.max_open_episodes = 1
        collate = Collator(constant_tokens, 0, len(CAMERAS), 1)
        batch = [jpeg.sample(0, np.random.default_rng(n)) for n in range(BATCH)]
        naive, bare = rate(self.naive["jpeg"].__getitem__, self.seconds), self.bare_jpeg()
        rows = [
            ("naive: reopen, per-step SO(3), float32 maps", naive),
            ("this loader's sample", self.sampling(jpeg)),
            ("  with crop, colour and blur", self.sampling(self.dataset("jpeg", train=True))),
            ("  colour left to the device", self.sampling(self.dataset("jpeg", train=True, defer_color=True))),
            ("  a new file for every sample", self.sampling(reopening)),
            ("  as a dictionary (float32 images and maps)", self.dictionary(jpeg)),
            ("bare decoding of its two JPEGs", bare),
            ("collating batches of 32", BATCH * rate(lambda n: collate(batch), self.seconds)),
        ]
        print(f"{'JPEG, one core':<48}{'samples/s':>10}{'x naive':>9}{'time / bare':>13}")
        for name, value in rows:
            print(f"{name:<48}{value:>10.0f}{value / naive:>9.1f}{bare / value:>13.2f}")

    def dictionary(self, dataset: H5DatasetMapBase) -> float:
        def draw(number: int):
            episode, frame = self.order[number % len(self.order)].tolist()
            return sample_to_dict(dataset.sample(episode, np.random.default_rng(number), frame))

        return rate(draw, self.seconds)

    def storage(self) -> None:
        naive = rate(self.naive["video"].__getitem__, self.seconds)
        rows = [("naive video: reopen, decord, per-step SO(3)", naive, None)]
        rows += [("JPEG", self.sampling(self.dataset("jpeg")), self.bare_jpeg())]
        rows += [("raw", self.sampling(self.dataset("raw")), self.bare_raw())]
        for reader in READERS:
            if importlib.util.find_spec({"pyav": "av"}.get(reader, reader)) is None:
                print(f"({reader} is not installed; left out)")
                continue
            rows += [(f"video, {reader}", self.sampling(self.dataset("video", video_reader=reader)),
                      self.bare_video(reader))]  # fmt: skip
        print(f"\n{'Storage, one core':<48}{'samples/s':>10}{'x naive':>9}{'time / bare':>13}")
        for name, value, bare in rows:
            print(f"{name:<48}{value:>10.0f}{value / naive:>9.1f}" + (f"{bare / value:>13.2f}" if bare else ""))

    def workers(self, batches: int) -> None:
        print(f"\n{'DataLoader, batches of 32, wall-clock':<48}{'1 worker':>10}{'2 workers':>11}{'x naive':>9}")
        measured = {}
        for kind in ("jpeg", "video"):
            measured[f"naive, {kind}"] = [
                wall_rate(torch.utils.data.DataLoader(self.naive[kind], BATCH, num_workers=workers), batches // 4)
                for workers in (1, 2)
            ]
            measured[f"this loader, {kind}"] = [self._loader_rate(kind, workers, batches) for workers in (1, 2)]
        for kind in ("jpeg", "video"):
            base = measured[f"naive, {kind}"]
            for name in (f"naive, {kind}", f"this loader, {kind}"):
                one, two = measured[name]
                print(f"{name:<48}{one:>10.0f}{two:>11.0f}{one / base[0]:>9.1f}")

    def _loader_rate(self, kind: str, workers: int, batches: int) -> float:
        multiplex = max(1, -(-(batches + 8) * BATCH // len(self.paths[kind])))
        options = LoaderOptions(batch_size=BATCH, workers=workers, multiplex=multiplex)
        loader, _ = build_loader([self.dataset(kind)], options, tokenize=constant_tokens, pad_id=0)
        return wall_rate(loader, batches)


def constant_tokens(prompt: str, cameras: int) -> TokenizedPrompt:
    """Tokens of about a prompt's length; tokenizing is cached per prompt in a run."""
    return TokenizedPrompt(np.arange(160), np.zeros((3, 160), np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="process time spent on each row")
    parser.add_argument("--episodes", type=int, default=12)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--size", type=int, default=256, help="height and width of the frames")
    parser.add_argument("--key-frames", type=int, default=2, help="a key frame every so many (LeRobot writes 2)")
    options = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(Path(folder), options)
        frames = options.episodes * options.frames * len(CAMERAS)
        sizes = {
            kind: sum(path.stat().st_size for path in Path(folder).glob(pattern)) / frames / 1024
            for kind, pattern in (("JPEG", "*_jpeg.h5"), ("raw", "*_raw.h5"), ("video", "*.mp4"))
        }
        print(
            f"{len(CAMERAS)} cameras of {options.size}x{options.size}, KiB per frame: "
            + ", ".join(f"{kind} {size:.1f}" for kind, size in sizes.items())
            + "\n"
        )
        benchmark.one_core()
        benchmark.storage()
        benchmark.workers(batches=max(8, round(options.seconds * 10)))


if __name__ == "__main__":
    main()
