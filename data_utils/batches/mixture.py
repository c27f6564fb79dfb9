"""The datasets of a run as one, addressed by :class:`SampleKey`; episodes that cannot be read are replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from data_utils.batches.samplers import SampleKey
from data_utils.errors import DataError, UnusableEpisode
from data_utils.samples.dataset import H5DatasetMapBase
from data_utils.types import Sample

ATTEMPTS = 8  # episodes tried for one key
PID, READING, SINCE = range(3)  # columns of the notes that workers leave
ENDED, HUNG = 1, 2  # why an episode is blocked
_REASONS = {ENDED: "reading it ended a loader process", HUNG: "reading it hung a loader process"}


class Mixture(Dataset):
    """Samples of several datasets; every sample depends on (seed, key), and on which episodes can be read, alone.

    Where an episode cannot be read another one of its dataset is drawn in its place, by a generator of its own, and
    the sample's ``skipped`` says so. What workers are reading stands in shared memory, so that the main process knows
    it of a worker that died, and can block an episode in all workers at once.

    Args:
        datasets: opened.
        seed: of everything drawn.
        workers: processes that will read.
    """

    def __init__(self, datasets: Sequence[H5DatasetMapBase], seed: int, workers: int = 0) -> None:
        self.datasets = list(datasets)
        self.seed = seed
        self._firsts = np.cumsum([0, *(len(dataset) for dataset in self.datasets)])
        # Plain shared memory: a process that dies at any moment leaves no lock behind.
        self._blocked = torch.zeros(int(self._firsts[-1]), dtype=torch.uint8).share_memory_()
        self._notes = torch.zeros(workers, 3, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, key: SampleKey) -> Sample:
        """The sample of a key.

        Raises:
            DataError: of the first episode, where none of the replacements can be read either.
        """
        dataset = self.datasets[key.dataset]
        episode, frame, rng = key.episode, key.frame, key.generator(self.seed)
        skipped: list[UnusableEpisode] = []
        for attempt in range(ATTEMPTS):
            number = int(self._firsts[key.dataset]) + episode
            reason = int(self._blocked[number])
            if reason:
                what = f"{_REASONS[reason]}; it is not opened again"
                path = dataset.paths[episode]
                skipped.append(UnusableEpisode(path, "file", f"{path}: {what}", blocked=True))
            else:
                self._note(number + 1)
                try:
                    sample = dataset.sample(episode, rng, frame)
                    sample.skipped = tuple(skipped)
                    return sample
                except DataError as error:
                    skipped.append(UnusableEpisode(dataset.paths[episode], error.rule, str(error)))
                finally:
                    self._note(0)
            rng = key.replacement_generator(self.seed, attempt)
            episode, frame = int(rng.integers(len(dataset))), None
        raise DataError(f"{skipped[0].message} (and {ATTEMPTS - 1} other draws failed)", skipped[0].rule)

    # -- inside a worker ------------------------------------------------------------------------------------------

    def join(self, worker: int) -> None:
        """Note which process is loader worker ``worker``; called in it."""
        self._notes[worker] = torch.tensor([os.getpid(), 0, 0])

    def _note(self, number: int) -> None:
        worker = get_worker_info()
        if worker is not None:
            self._notes[worker.id, SINCE] = time.monotonic_ns()
            self._notes[worker.id, READING] = number

    # -- in the main process --------------------------------------------------------------------------------------

    def reading(self) -> Iterator[tuple[int, int, float]]:
        """(process id, number of the episode, seconds so far) of every worker that is reading one."""
        now = time.monotonic_ns()
        for pid, number, since in self._notes.tolist():
            if number:
                yield pid, number - 1, (now - since) / 1e9

    def path(self, number: int) -> str:
        """File of an episode, by its number among all datasets'."""
        dataset = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self.datasets[dataset].paths[number - int(self._firsts[dataset])]

    def block(self, number: int, reason: int = ENDED) -> None:
        """Never open an episode again, in any worker of this process."""
        self._blocked[number] = reason

    def block_paths(self, paths: set[str]) -> None:
        """:meth:`block` by files; those of no dataset are ignored."""
        if paths:
            for first, dataset in zip(self._firsts.tolist(), self.datasets, strict=False):
                for episode, path in enumerate(dataset.paths):
                    if path in paths and not self._blocked[first + episode]:
                        self.block(first + episode)
