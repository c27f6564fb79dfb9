"""Datasets -> a DataLoader of :class:`Batch`, the same for any number of workers and any starting point."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Sequence

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from data_utils.collate import Collator
from data_utils.dataset_base import H5DatasetMapBase
from data_utils.errors import DataError
from data_utils.samplers import DistributedMultiplexSampler, DistributedWeightedSampler, SampleKey
from data_utils.types import Batch, Sample, TokenizedPrompt

logger = logging.getLogger(__name__)

ATTEMPTS = 8  # other episodes tried in place of one that cannot be read
MAX_UNREADABLE = 100


class Mixture(Dataset):
    """The datasets of a run, addressed by :class:`SampleKey`; every sample depends on (seed, key) alone.

    An episode that turns out damaged is named in the log, counted, and another one of its dataset is drawn in its
    place (by the key's generator). Beyond ``max_unreadable`` such reads, over all workers, the error is raised.
    """

    def __init__(self, datasets: Sequence[H5DatasetMapBase], seed: int, max_unreadable: int = MAX_UNREADABLE) -> None:
        self.datasets = list(datasets)
        self.seed = seed
        self.max_unreadable = max_unreadable
        # Shared with the workers, however they are started.
        self._unreadable = multiprocessing.get_context("spawn").Value("q", 0)

    @property
    def unreadable(self) -> int:
        """Reads that failed so far, over all workers."""
        return self._unreadable.value

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, key: SampleKey) -> Sample:
        dataset, rng = self.datasets[key.dataset], key.generator(self.seed)
        episode = key.episode
        for attempt in range(ATTEMPTS):
            try:
                return dataset.sample(episode, rng)
            except DataError as error:
                with self._unreadable.get_lock():
                    self._unreadable.value += 1
                if attempt == ATTEMPTS - 1 or self.unreadable > self.max_unreadable:
                    raise
                logger.warning("episode skipped (%d unreadable so far): %s", self.unreadable, error)
            episode = int(rng.integers(len(dataset)))
        raise AssertionError("unreachable: the last attempt returns or raises")


def build_loader(
    datasets: Sequence[H5DatasetMapBase],
    *,
    weights: Sequence[float] | None,
    multiplex: int,
    batch_size: int,
    workers: int,
    rank: int,
    world_size: int,
    seed: int,
    tokenize: Callable[[str, int], TokenizedPrompt],
    pad_id: int,
    pin_memory: bool,
    persistent_workers: bool,
    prefetch_factor: int,
    timeout: float,
    train: bool = True,
    num_samples: int | None = None,
    pad_multiple: int = 1,
) -> tuple[DataLoader, DistributedWeightedSampler | DistributedMultiplexSampler]:
    """Build the loader of one rank and its sampler (for ``set_epoch`` and ``set_start``, which counts batches).

    Args:
        datasets: opened datasets; their ``num_obs``, ``num_history``, ``num_future`` and ``image_hw`` must agree.
        weights: share of each dataset; None: every episode ``multiplex`` times per epoch.
        multiplex: rounds per epoch; with weights, an epoch is ``multiplex`` times all episodes unless ``num_samples``.
        batch_size: samples per batch of this rank.
        workers: processes; 0 loads in this one.
        rank, world_size: this process among all that train.
        seed: of the order and of everything drawn.
        tokenize: (prompt, number of shown cameras) -> tokens; must be picklable where workers are spawned.
        pad_id: token id on padding.
        pin_memory, persistent_workers, prefetch_factor, timeout (seconds): as in torch's DataLoader.
        train: drop the last, incomplete batch.
        num_samples: length of a weighted epoch over all ranks.
        pad_multiple: prompt lengths are rounded up to a multiple of this.
    Raises:
        ValueError: no datasets, or datasets that disagree.
        DataError: an epoch shorter than one batch.
    """
    _check(datasets)
    sizes = [len(dataset) for dataset in datasets]
    common = {"rank": rank, "world_size": world_size, "seed": seed, "batch_size": batch_size}
    if weights is None:
        sampler = DistributedMultiplexSampler(sizes, multiplex, **common)
    else:
        length = sum(sizes) * multiplex if num_samples is None else num_samples
        sampler = DistributedWeightedSampler(sizes, weights, length, **common)
    if train and len(sampler) < batch_size:
        raise DataError(
            f"an epoch has {len(sampler)} samples per rank, less than one batch of {batch_size}; "
            "raise sample_multiplex or lower the batch size"
        )
    collate = Collator(
        tokenize,
        pad_id,
        num_cameras=max(dataset.config.num_cameras for dataset in datasets),
        num_arms=max(dataset.config.num_arms for dataset in datasets),
        pad_multiple=pad_multiple,
    )
    loader: DataLoader[Batch] = DataLoader(
        Mixture(datasets, seed),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        drop_last=train,
        timeout=timeout if workers else 0,
        worker_init_fn=_one_thread,
        persistent_workers=persistent_workers and workers > 0,
        prefetch_factor=prefetch_factor if workers else None,
        # Its own generator: without one, every epoch would take a number from torch's global stream.
        generator=torch.Generator().manual_seed(seed),
    )
    return loader, sampler


def _one_thread(worker: int) -> None:
    """Workers are the parallelism; threads inside them only fight over the cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _check(datasets: Sequence[H5DatasetMapBase]) -> None:
    if not datasets:
        raise ValueError("a loader needs at least one dataset")
    first = datasets[0]
    for dataset in datasets[1:]:
        for field in ("num_obs", "num_history", "num_future", "image_hw"):
            mine, other = getattr(dataset.config, field), getattr(first.config, field)
            if mine != other:
                raise ValueError(
                    f"datasets of a mixture must agree: {dataset.name}.{field} is {mine}, {first.name}.{field} {other}"
                )
