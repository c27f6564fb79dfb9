"""Datasets -> batches, the same for any number of workers and any starting point, whatever becomes of the workers."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, get_worker_info

from data_utils.batches.collate import Collator
from data_utils.batches.mixture import ENDED, HUNG, Mixture
from data_utils.batches.options import LoaderOptions
from data_utils.batches.samplers import DistributedMultiplexSampler, DistributedWeightedSampler, ListedSampler
from data_utils.batches.workers import single_threaded, start_workers, without_traceback
from data_utils.errors import DataError
from data_utils.samples.dataset import H5DatasetMapBase
from data_utils.types import Batch, TokenizedPrompt
from data_utils.words import ending

logger = logging.getLogger(__name__)

AnySampler = DistributedWeightedSampler | DistributedMultiplexSampler | ListedSampler

MAX_RESTARTS, RESTART_WINDOW = 8, 1000  # restarts that no episode explains, within so many batches
_KEPT_OPEN, _OTHER_FILES = 1024, 512  # episodes of a rank; of a process's files those that are no episodes
POLL_S = 5.0  # how soon a dead worker is noticed; workers on a busy machine take up an epoch sooner than this
# What a library does to its process; a worker that ends in another way may have been killed by somebody.
CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL}


class Loader:
    """Batches of this rank, epoch by epoch (``sampler.set_epoch`` and ``set_start`` say from where).

    A worker that dies or hangs costs nothing but time: all workers are started again at the batch that is due. The
    episode that it was reading is blocked where a library crashed or hung over it, or where it happens twice.

    Args:
        mixture: the datasets.
        sampler: the order.
        timeout: seconds to wait for a batch before a worker counts as hanging; 0: for ever.
        options: of torch's ``DataLoader``.
    """

    def __init__(
        self,
        mixture: Mixture,
        sampler: AnySampler,
        timeout: float,
        options: dict,
    ) -> None:
        self.mixture = mixture
        self.sampler = sampler
        self.timeout = timeout or float("inf")
        self.options = options
        self.restarts = 0
        self._loader: DataLoader[Batch] | None = None
        self._workers: list[multiprocessing.Process] = []
        self._suspects: dict[int, int] = {}  # episode that a lost worker was reading -> batches delivered then
        self._unexplained: deque[int] = deque()  # batches delivered when workers were lost for no known reason
        self._delivered = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._torch_loader())

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers there are."""
        return [process.pid for process in self._workers]

    def __iter__(self) -> Iterator[Batch]:
        """Raises ``DataError`` where neither an episode nor its replacements can be read, or workers keep dying."""
        start = step = self.sampler.start
        while True:
            self.sampler.set_start(step)
            try:
                batches = self._begin()
                while (batch := self._next(batches)) is not None:
                    step += 1
                    self._delivered += 1
                    yield batch
                self.sampler.set_start(start)
                return
            except _WorkersLost as lost:
                self._recover(lost.dead, step)
            except Exception:  # left to the garbage collector, workers would be waited for
                self._end_workers()
                raise

    def _torch_loader(self) -> DataLoader:
        if self._loader is None:
            self._loader = DataLoader(self.mixture, sampler=self.sampler, **self.options)
        return self._loader

    def _begin(self) -> Iterator[Batch]:
        loader = self._torch_loader()
        before = set(multiprocessing.active_children())
        try:
            batches = start_workers(loader)
        except RuntimeError as error:
            # Workers that stay from the epoch before have ended since, or are slow to take up the new one.
            dead = self._dead(patience=0.0)
            if dead:
                raise _WorkersLost(dead) from error
            if not self._workers or "DataLoader timed out" not in str(error):
                raise
            self._end_workers()
            return self._begin()
        started = [process for process in multiprocessing.active_children() if process not in before]
        self._workers = started or self._workers
        return batches

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        began = time.monotonic()
        while True:
            try:
                return next(batches, None)
            except DataError as error:
                raise without_traceback(error) from error
            except Exception as error:
                if not self._workers or "in DataLoader worker process" in str(error):
                    raise
                # A worker's end can show as a broken connection before it shows as the end of the process.
                is_timeout = "DataLoader timed out" in str(error)
                dead = self._dead(patience=0.0 if is_timeout else 2.0)
                if dead:
                    raise _WorkersLost(dead) from error
                if not is_timeout:
                    raise
                if time.monotonic() - began > self.timeout:
                    raise _WorkersLost([]) from error

    def _dead(self, patience: float) -> list[multiprocessing.Process]:
        deadline = time.monotonic() + patience
        while True:
            dead = [process for process in self._workers if not process.is_alive()]
            if dead or time.monotonic() > deadline:
                return dead
            time.sleep(0.05)

    def _recover(self, dead: list[multiprocessing.Process], step: int) -> None:
        """Find out what the lost workers were reading, end the others, and make ready to start again."""
        reading = list(self.mixture.reading())
        reports, explained = [], False
        for process in dead:
            number = next((number for pid, number, _ in reading if pid == process.pid), None)
            report = f"loader worker {process.pid} {ending(process.exitcode)}"
            if number is None:
                reports.append(f"{report}, reading nothing")
                continue
            reports.append(f"{report}, reading {self.mixture.path(number)}")
            # The same draw comes up again within the batches that workers make ahead.
            ahead = self.options["num_workers"] * self.options["prefetch_factor"]
            again = self._delivered - self._suspects.get(number, -ahead - 1) <= ahead
            if process.exitcode in CRASHES or again:
                self.mixture.block(number, ENDED)
                explained = True
            self._suspects[number] = self._delivered
        if not dead:
            pid, number, seconds = max(reading, key=lambda entry: entry[2], default=(0, 0, 0.0))
            if seconds > self.timeout / 2:
                self.mixture.block(number, HUNG)
                explained = True
                reports.append(f"loader worker {pid} hangs over {self.mixture.path(number)} since {seconds:.0f} s")
            else:
                reports.append(f"no batch came for {self.timeout:g} s, and no worker hangs over an episode")
        self._end_workers()
        self.restarts += 1
        if not explained:
            self._unexplained.append(self._delivered)
            while self._unexplained[0] < self._delivered - RESTART_WINDOW:
                self._unexplained.popleft()
        if len(self._unexplained) > MAX_RESTARTS:
            raise DataError(
                f"loader workers were lost {len(self._unexplained)} times within {RESTART_WINDOW} batches, at last: "
                f"{reports[-1]}; look for a lack of memory, or lower --workers",
                "file",
            )
        logger.warning("%s; workers are started again at batch %d of the epoch", "; ".join(reports), step)

    def _end_workers(self) -> None:
        for process in self._workers:
            process.kill()
        for process in self._workers:
            process.join()
        self._workers, self._loader = [], None


class _WorkersLost(Exception):
    """Workers have died, or (none ``dead``) nothing came for too long."""

    def __init__(self, dead: list[multiprocessing.Process]) -> None:
        super().__init__()
        self.dead = dead


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """Of one rank, which has ``samples`` per epoch. Raises ``DataError`` where they fill no batch."""
    if samples < batch_size:
        raise DataError(
            f"an epoch has {samples} samples per rank, less than one batch of {batch_size}; "
            "raise sample_multiplex or lower the batch size",
            "location",
        )
    return samples // batch_size


def build_loader(
    datasets: Sequence[H5DatasetMapBase],
    options: LoaderOptions,
    *,
    tokenize: Callable[[str, int], TokenizedPrompt],
    pad_id: int,
    rank: int = 0,
    world_size: int = 1,
    train: bool = True,
    num_samples: int | None = None,
    pad_multiple: int = 1,
    sampler: AnySampler | None = None,
) -> tuple[Loader, AnySampler]:
    """Build the loader of one rank and its sampler (for ``set_epoch`` and ``set_start``, which counts batches).

    Args:
        datasets: opened datasets; their ``num_obs``, ``num_history``, ``num_future`` and ``image_hw`` must agree.
        tokenize: (prompt, number of shown cameras) -> tokens; must be picklable where workers are spawned.
        pad_id: token id on padding.
        rank, world_size: this process among all that train.
        train: drop the last, incomplete batch.
        num_samples: length of a weighted epoch over all ranks; None: as the options say.
        pad_multiple: prompt lengths are rounded up to a multiple of this.
        sampler: this rank's order; None: as the options say.
    Raises:
        ValueError: no datasets, or datasets that disagree.
        DataError: an epoch shorter than one batch.
    """
    _check(datasets)
    if sampler is None:
        sampler = make_sampler(datasets, options, rank, world_size, num_samples)
    if train:
        batches_per_epoch(len(sampler), options.batch_size)
    collate = Collator(
        tokenize,
        pad_id,
        num_cameras=max(dataset.config.num_cameras for dataset in datasets),
        num_arms=max(dataset.config.num_arms for dataset in datasets),
        pad_multiple=pad_multiple,
    )
    workers = options.workers
    for dataset in datasets:
        dataset.max_open_episodes = max(dataset.max_open_episodes, kept_open(len(datasets), workers))
    loader = Loader(
        Mixture(datasets, options.seed, workers),
        sampler,
        options.timeout,
        {
            "batch_size": options.batch_size,
            "num_workers": workers,
            "collate_fn": collate,
            "pin_memory": options.pin_memory,
            "drop_last": train,
            "timeout": POLL_S if workers else 0,
            "worker_init_fn": _start_worker,
            "persistent_workers": options.persistent_workers and workers > 0,
            "prefetch_factor": options.prefetch_factor if workers else None,
            # Its own generator: without one, every epoch would take a number from torch's global stream.
            "generator": torch.Generator().manual_seed(options.seed),
        },
    )
    return loader, sampler


def kept_open(datasets: int, workers: int) -> int:
    """Episodes that each dataset may keep open in a process, of all that a rank keeps: opening one takes longer than
    reading a sample, and an open one 1.6 MB and one of the files that a process may have."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    processes = max(1, workers)
    return min(_KEPT_OPEN // (processes * datasets), (files - _OTHER_FILES) // datasets)


def make_sampler(
    datasets: Sequence[H5DatasetMapBase],
    options: LoaderOptions,
    rank: int,
    world_size: int,
    num_samples: int | None = None,
) -> DistributedWeightedSampler | DistributedMultiplexSampler:
    """The order of samples of one rank; arguments as of :func:`build_loader`."""
    sizes = [len(dataset) for dataset in datasets]
    lengths = [dataset.lengths for dataset in datasets] if options.sample_by == "frame" else None
    common = {
        "lengths": lengths,
        "rank": rank,
        "world_size": world_size,
        "seed": options.seed,
        "batch_size": options.batch_size,
    }
    if options.weights is None:
        return DistributedMultiplexSampler(sizes, options.multiplex, **common)
    items = sum(sizes) if lengths is None else sum(int(frames.sum()) for frames in lengths)
    length = items * options.multiplex if num_samples is None else num_samples
    return DistributedWeightedSampler(sizes, list(options.weights), length, **common)


def _start_worker(worker: int) -> None:
    single_threaded(worker)
    get_worker_info().dataset.join(worker)


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
