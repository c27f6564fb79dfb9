"""Which episode of which dataset is drawn when: deterministic, rank-disjoint, resumable in mid-epoch.

Both samplers lay the whole epoch out as one global sequence that depends on (seed, epoch) alone; rank r of R takes
positions r, r + R, ... of it. The tail that does not divide by R is left out, so every rank has the same length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """One draw: ``episode`` of ``dataset``, at the global position ``draw`` of ``epoch``."""

    dataset: int
    episode: int
    draw: int
    epoch: int = 0

    def generator(self, seed: int) -> np.random.Generator:
        """The generator of everything drawn for this sample; independent of workers, ranks and resumption."""
        return _generator(seed, self.epoch, 0, self.draw)


def _generator(seed: int, epoch: int, *stream: int) -> np.random.Generator:
    # A spawn key, unlike longer entropy, keeps streams of different length apart.
    return np.random.default_rng(np.random.SeedSequence((seed, epoch), spawn_key=stream))


class _DistributedSampler(Sampler[SampleKey], ABC):
    """Epochs, ranks and resumption; subclasses lay out the epoch.

    Args:
        sizes: episodes per dataset.
        rank, world_size: this process among all that train.
        seed: of the order.
        batch_size: samples per step of this rank; the unit of :meth:`set_start`.
    """

    def __init__(self, sizes: Sequence[int], *, rank: int, world_size: int, seed: int, batch_size: int) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"dataset sizes are {list(sizes)}; every dataset needs at least one episode")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below the world size {world_size}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.sizes = tuple(sizes)
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.batch_size = batch_size
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next, from its beginning."""
        self.epoch = epoch
        self.start = 0

    def set_start(self, step: int) -> None:
        """Let the iterations of this epoch begin at batch ``step`` of this rank, as a run that was there would.

        Raises:
            ValueError: the epoch has no such step.
        """
        if not 0 <= step * self.batch_size <= len(self):
            raise ValueError(f"step {step} is outside the epoch of {len(self) // self.batch_size} steps")
        self.start = step

    def __len__(self) -> int:
        """Samples of one whole epoch on this rank."""
        return self._epoch_length() // self.world_size

    def __iter__(self) -> Iterator[SampleKey]:
        datasets, episodes = self._layout()
        end = len(self) * self.world_size
        for draw in range(self.start * self.batch_size * self.world_size + self.rank, end, self.world_size):
            yield SampleKey(int(datasets[draw]), int(episodes[draw]), draw, self.epoch)

    def _rng(self, *stream: int) -> np.random.Generator:
        return _generator(self.seed, self.epoch, 1, *stream)

    @abstractmethod
    def _epoch_length(self) -> int:
        """Positions of one epoch over all ranks."""

    @abstractmethod
    def _layout(self) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and episode of every position of the epoch, (length,) each."""


class DistributedWeightedSampler(_DistributedSampler):
    """Each dataset's share of an epoch follows its weight, whatever its size.

    A dataset is gone through in a random order, without replacement until it is used up, then in another. Shares are
    exact to one sample, and spread over the epoch at random.

    Args:
        sizes: episodes per dataset.
        weights: one non-negative number per dataset, in any unit.
        num_samples: length of an epoch over all ranks; None: all episodes together.
        rank, world_size, seed, batch_size: see :class:`_DistributedSampler`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        num_samples: int | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        batch_size: int = 1,
    ) -> None:
        super().__init__(sizes, rank=rank, world_size=world_size, seed=seed, batch_size=batch_size)
        if len(weights) != len(sizes):
            raise ValueError(f"{len(weights)} weights for {len(sizes)} datasets; give one each")
        self.weights = np.asarray(weights, np.float64)
        if not np.isfinite(self.weights).all() or (self.weights < 0).any() or self.weights.sum() == 0:
            raise ValueError(f"dataset weights are {list(weights)}; wanted non-negative numbers, not all zero")
        self.num_samples = sum(self.sizes) if num_samples is None else num_samples
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")

    def _epoch_length(self) -> int:
        return self.num_samples

    def _layout(self) -> tuple[np.ndarray, np.ndarray]:
        quota = self.weights / self.weights.sum() * self.num_samples
        counts = np.floor(quota).astype(np.int64)
        leftover = self.num_samples - counts.sum()
        if leftover:  # drawn, so that over many epochs every share is right on average
            remainder = (quota - counts) / (quota - counts).sum()
            counts += self._rng(0).multinomial(leftover, remainder)
        datasets = np.repeat(np.arange(len(self.sizes)), counts)
        self._rng(1).shuffle(datasets)
        episodes = np.empty(self.num_samples, np.int64)
        for dataset, (size, count) in enumerate(zip(self.sizes, counts.tolist(), strict=True)):
            rng = self._rng(2, dataset)
            rounds = [rng.permutation(size) for _ in range(-(-count // size))]
            if rounds:
                episodes[datasets == dataset] = np.concatenate(rounds)[:count]
        return datasets, episodes


class DistributedMultiplexSampler(_DistributedSampler):
    """Every episode of every dataset ``multiplex`` times per epoch, each round in its own random order.

    Within a round no episode is drawn twice, by any rank.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        multiplex: int = 1,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        batch_size: int = 1,
    ) -> None:
        super().__init__(sizes, rank=rank, world_size=world_size, seed=seed, batch_size=batch_size)
        if multiplex < 1:
            raise ValueError(f"multiplex is {multiplex}; it must be at least 1")
        self.multiplex = multiplex

    def _epoch_length(self) -> int:
        return sum(self.sizes) * self.multiplex

    def _layout(self) -> tuple[np.ndarray, np.ndarray]:
        total = sum(self.sizes)
        order = np.concatenate([self._rng(3, round_).permutation(total) for round_ in range(self.multiplex)])
        firsts = np.concatenate([[0], np.cumsum(self.sizes)])
        datasets = np.searchsorted(firsts, order, side="right") - 1
        return datasets, order - firsts[datasets]
