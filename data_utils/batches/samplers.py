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
    """One draw: ``episode`` of ``dataset``, at the global position ``draw`` of ``epoch``.

    ``frame`` is the current frame, None where it is drawn with everything else.
    """

    dataset: int
    episode: int
    draw: int
    epoch: int = 0
    frame: int | None = None

    def generator(self, seed: int) -> np.random.Generator:
        """The generator of everything drawn for this sample; independent of workers, ranks and resumption."""
        return _generator(seed, self.epoch, 0, self.draw)

    def replacement_generator(self, seed: int, attempt: int) -> np.random.Generator:
        """The generator of what is drawn where the episode cannot be read, for the ``attempt``-th time."""
        return _generator(seed, self.epoch, 2, self.draw, attempt)


def _generator(seed: int, epoch: int, *stream: int) -> np.random.Generator:
    # A spawn key, unlike longer entropy, keeps streams of different length apart.
    return np.random.default_rng(np.random.SeedSequence((seed, epoch), spawn_key=stream))


class ListedSampler(Sampler[SampleKey]):
    """The keys of one rank as they are listed.

    Args:
        batch_size: the unit of :meth:`set_start`.
    """

    def __init__(self, keys: Sequence[SampleKey], batch_size: int) -> None:
        self._keys, self._batch_size = keys, batch_size
        self.start = 0

    def set_start(self, step: int) -> None:
        """Let the iterations begin at batch ``step``."""
        self.start = step

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[SampleKey]:
        return iter(self._keys[self.start * self._batch_size :])


CHUNK = 1 << 22  # positions of a weighted epoch that are laid out together
BLOCK = 1 << 13  # positions whose keys are made together


class _DistributedSampler(Sampler[SampleKey], ABC):
    """Epochs, ranks and resumption; subclasses lay out the epoch, in chunks, so that its length costs no memory.

    An item of a dataset is an episode or, where ``lengths`` are given, one frame of one.

    Args:
        sizes: episodes per dataset.
        lengths: per dataset, the frames of its episodes; None: items are episodes.
        rank, world_size: this process among all that train.
        seed: of the order.
        batch_size: samples per step of this rank; the unit of :meth:`set_start`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        lengths: Sequence[Sequence[int]] | None,
        rank: int,
        world_size: int,
        seed: int,
        batch_size: int,
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"dataset sizes are {list(sizes)}; every dataset needs at least one episode")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below the world size {world_size}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if lengths is not None and [len(frames) for frames in lengths] != list(sizes):
            raise ValueError("lengths must give the frames of every episode of every dataset")
        self._ends = None  # per dataset, the number of frames up to and including each episode
        if lengths is not None:
            self._ends = [np.cumsum(frames, dtype=np.int64) for frames in lengths]
        self.sizes = tuple(sizes)
        self.num_items = self.sizes if self._ends is None else tuple(int(ends[-1]) for ends in self._ends)
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
        return self.epoch_length // self.world_size

    def __iter__(self) -> Iterator[SampleKey]:
        first = self.start * self.batch_size * self.world_size + self.rank
        end, epoch, chunk = len(self) * self.world_size, self.epoch, self._chunk_length()
        while first < end:
            number, offset = divmod(first, chunk)
            datasets, items = self._layout(number)  # positions number * chunk to number * chunk + len(datasets)
            for start in range(offset, len(datasets), BLOCK * self.world_size):
                positions = np.arange(start, min(start + BLOCK * self.world_size, len(datasets)), self.world_size)
                positions = positions[positions + number * chunk < end]
                yield from self._keys(datasets[positions], items[positions], positions + number * chunk, epoch)
            # The next of this rank's positions, which need not be the next chunk's first.
            first += -(-(len(datasets) - offset) // self.world_size) * self.world_size

    def _keys(self, datasets: np.ndarray, items: np.ndarray, draws: np.ndarray, epoch: int) -> Iterator[SampleKey]:
        if self._ends is None:
            for dataset, episode, draw in zip(datasets.tolist(), items.tolist(), draws.tolist(), strict=True):
                yield SampleKey(dataset, episode, draw, epoch)
            return
        episodes, frames = np.empty(len(items), np.int64), np.empty(len(items), np.int64)
        for dataset, ends in enumerate(self._ends):
            mine = datasets == dataset
            item = items[mine].astype(np.int64)
            episodes[mine] = episode = np.searchsorted(ends, item, side="right")
            frames[mine] = item - np.where(episode > 0, ends[episode - 1], 0)
        columns = (datasets, episodes, draws, frames)
        for dataset, episode, draw, frame in zip(*(column.tolist() for column in columns), strict=True):
            yield SampleKey(dataset, episode, draw, epoch, frame)

    def _rng(self, *stream: int) -> np.random.Generator:
        return _generator(self.seed, self.epoch, 1, *stream)

    def _permutation(self, size: int, *stream: int) -> np.ndarray:
        """(size,) the items in random order, as small as their number allows."""
        order = np.arange(size, dtype=np.uint32 if size <= 1 << 32 else np.int64)
        self._rng(*stream).shuffle(order)
        return order

    @property
    @abstractmethod
    def epoch_length(self) -> int:
        """Samples of one epoch over all ranks, the tail that does not divide by them included."""

    @abstractmethod
    def _chunk_length(self) -> int:
        """Positions of every chunk but the last."""

    @abstractmethod
    def _layout(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and item of every position of a chunk, (length,) each."""


class DistributedWeightedSampler(_DistributedSampler):
    """Each dataset's share of an epoch follows its weight, whatever its size.

    A dataset is gone through in a random order, without replacement until it is used up, then in another. Shares are
    exact to one sample, and spread over the epoch at random.

    Args:
        sizes: episodes per dataset.
        weights: one non-negative number per dataset, in any unit.
        num_samples: length of an epoch over all ranks; None: all items together.
        lengths, rank, world_size, seed, batch_size: see :class:`_DistributedSampler`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        num_samples: int | None = None,
        *,
        lengths: Sequence[Sequence[int]] | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        batch_size: int = 1,
    ) -> None:
        super().__init__(sizes, lengths=lengths, rank=rank, world_size=world_size, seed=seed, batch_size=batch_size)
        if len(weights) != len(sizes):
            raise ValueError(f"{len(weights)} weights for {len(sizes)} datasets; give one each")
        self.weights = np.asarray(weights, np.float64)
        if not np.isfinite(self.weights).all() or (self.weights < 0).any() or self.weights.sum() == 0:
            raise ValueError(f"dataset weights are {list(weights)}; wanted non-negative numbers, not all zero")
        self.num_samples = sum(self.num_items) if num_samples is None else num_samples
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")

    @property
    def epoch_length(self) -> int:
        return self.num_samples

    def _chunk_length(self) -> int:
        return CHUNK

    def _layout(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        before, counts = self._shares(chunk)
        datasets = np.repeat(np.arange(len(self.sizes), dtype=np.uint16), counts)
        self._rng(1, chunk).shuffle(datasets)
        items = np.empty(len(datasets), np.uint32 if max(self.num_items) <= 1 << 32 else np.int64)
        for dataset, size in enumerate(self.num_items):
            first, end = int(before[dataset]), int(before[dataset] + counts[dataset])
            rounds = [
                self._permutation(size, 2, dataset, round_)[max(first - round_ * size, 0) : end - round_ * size]
                for round_ in range(first // size, -(-end // size))
            ]
            if rounds:
                items[datasets == dataset] = np.concatenate(rounds)
        return datasets, items

    def _shares(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples of each dataset in the chunks before this one, and in it."""
        quota = self.weights / self.weights.sum() * self.num_samples
        left = np.floor(quota).astype(np.int64)
        if leftover := self.num_samples - left.sum():  # drawn, so that over many epochs every share is right on average
            remainder = (quota - left) / (quota - left).sum()
            left += self._rng(0).multinomial(leftover, remainder)
        before = np.zeros_like(left)
        for _ in range(chunk + 1):
            total = left.sum()
            # What is left, spread evenly over what remains of the epoch; the rest goes where most is missing.
            share = left * (min(CHUNK, total) / total)
            counts = np.floor(share).astype(np.int64)
            most_missing = np.argsort(counts - share, kind="stable")
            counts[most_missing[: min(CHUNK, total) - counts.sum()]] += 1
            before, left = before + counts, left - counts
        return before - counts, counts


class DistributedMultiplexSampler(_DistributedSampler):
    """Every item of every dataset ``multiplex`` times per epoch, each round in its own random order.

    Within a round no item is drawn twice, by any rank. The arguments are those of :class:`_DistributedSampler`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        multiplex: int = 1,
        *,
        lengths: Sequence[Sequence[int]] | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        batch_size: int = 1,
    ) -> None:
        super().__init__(sizes, lengths=lengths, rank=rank, world_size=world_size, seed=seed, batch_size=batch_size)
        if multiplex < 1:
            raise ValueError(f"multiplex is {multiplex}; it must be at least 1")
        self.multiplex = multiplex

    @property
    def epoch_length(self) -> int:
        return sum(self.num_items) * self.multiplex

    def _chunk_length(self) -> int:
        return sum(self.num_items)

    def _layout(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        order = self._permutation(sum(self.num_items), 3, chunk)
        firsts = np.concatenate([[0], np.cumsum(self.num_items)])
        datasets = np.zeros(len(order), np.uint16)
        for first in firsts[1:-1]:
            datasets += order >= first
        return datasets, order - firsts.astype(order.dtype)[datasets]
