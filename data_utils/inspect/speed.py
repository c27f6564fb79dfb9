"""How fast these very episodes are read for training: samples per second, milliseconds per frame, cost of opening."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_utils.checks.contents import Contents
from data_utils.config import DataConfig
from data_utils.data_loc import Location
from data_utils.h5io import Episode
from data_utils.samples.dataset import H5DatasetMapBase
from data_utils.video import VideoCache

SECONDS = 3.0  # of measuring per number
OPENED = 20  # episodes opened with their data out of the page cache


@dataclass(frozen=True)
class CameraSpeed:
    """Random access to single frames: milliseconds per frame; frames measured."""

    milliseconds: float
    frames: int


@dataclass(frozen=True)
class Speed:
    """What was measured, in one process.

    Args:
        samples_per_second: whole samples, drawn like in training, augmentation included.
        cold_open_ms: opening an episode that is not in memory, with its first frames; mean.
        cameras: camera -> its speed.
    """

    samples_per_second: float
    cold_open_ms: float
    cameras: dict[str, CameraSpeed]


def config_of(contents: Contents) -> DataConfig:
    """A config that reads all that an episode has."""
    return DataConfig(cameras=tuple(contents.cameras), ee_indices=contents.arms)


def open_dataset(
    paths: Sequence[str],
    dataset_class: type[H5DatasetMapBase],
    config: DataConfig,
    video_root: str | None = None,
    video_reader: str = "decord",
    train: bool = True,
) -> H5DatasetMapBase:
    """The dataset over some files, whose videos may lie in another folder than they say."""
    source = paths if video_root is None else [Location(os.path.abspath(path), video_root) for path in paths]
    return dataset_class(source, config, train=train, video_reader=video_reader)


def measure(dataset: H5DatasetMapBase, seconds: float = SECONDS) -> Speed:
    """Measure for ``seconds`` per number; half of the first number's time is a warm-up."""
    rng = np.random.default_rng(0)
    cold = _cold_open(dataset)
    _samples(dataset, rng, seconds / 2)
    samples_per_second = _samples(dataset, rng, seconds)
    cameras = {camera: _frames(dataset, camera, rng, seconds / 2) for camera in dataset.config.cameras}
    return Speed(samples_per_second, 1000 * cold, cameras)


def _samples(dataset: H5DatasetMapBase, rng: np.random.Generator, seconds: float) -> float:
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        dataset.sample(int(rng.integers(len(dataset))), rng)
        count += 1
    return count / elapsed


def _frames(dataset: H5DatasetMapBase, camera: str, rng: np.random.Generator, seconds: float) -> CameraSpeed:
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        index = int(rng.integers(len(dataset)))
        dataset.episode(index).rgb(camera, int(rng.integers(dataset.episode_length(index))))
        count += 1
    return CameraSpeed(1000 * elapsed / count, count)


def _cold_open(dataset: H5DatasetMapBase) -> float:
    """Seconds to open an episode and read a frame of each camera, its files dropped from the page cache before."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, OPENED).astype(int)).tolist()
    spent = 0.0
    for index in indices:
        path, root = dataset.paths[index], dataset.paths.video_root(index)
        with Episode(path, dataset.config.cameras, root) as episode:
            files = {path} | {
                episode.video_location(camera, 0)[0] for camera in episode.cameras if episode.is_video(camera)
            }
        for file in files:
            _drop_from_memory(file)
        videos = VideoCache(dataset.video_reader)
        began = time.perf_counter()
        with Episode(path, dataset.config.cameras, root, videos) as episode:
            for camera in episode.cameras:
                episode.rgb(camera, 0)
        spent += time.perf_counter() - began
        videos.close()
    return spent / len(indices)


def _drop_from_memory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
