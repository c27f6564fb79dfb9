"""What a run trains on: its datasets, the batches they give, and how far the run is in them."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

from apt.configs import TrainConfig
from apt.model.compilation import pad_multiple
from apt.model.vlm import VLM
from apt.training.feature_cache import FeatureCache
from data_utils.batches.image_text import ImageTextPairs, image_text_batches
from data_utils.batches.loader import build_loader
from data_utils.datasets import get_dataset_class
from data_utils.samples.dataset import H5DatasetMapBase
from data_utils.samples.device_augment import recolored
from data_utils.samples.split import split
from data_utils.types import Batch, ImageTextBatch
from train_utils.backend import Backend
from train_utils.bad_episodes import SKIPPED, BadEpisodes
from train_utils.errors import ConfigError
from train_utils.metrics import Stopwatch


def open_datasets(
    config: TrainConfig, backend: Backend, say: Callable[[str], None]
) -> tuple[list[H5DatasetMapBase], list[H5DatasetMapBase], BadEpisodes]:
    """The datasets of a run, those of its held-out episodes (none: an empty list), and what their indexes found to be
    unusable; called by all ranks.

    Raises:
        DataError: nothing there, more than ``max_bad_fraction`` of the episodes cannot be used, or ``eval_split``
            leaves nothing on one side.
    """
    with backend.node_main_first():  # builds the indexes, which the others read
        datasets = [
            get_dataset_class(name)(
                config=data,
                train_stage=config.train_stage,
                seed=config.seed,
                defer_color=backend.device.type == "cuda",
                video_reader=config.video_reader,
                decode_threads=config.decode_threads,
            )
            for name, data in zip(config.dataset_classes, config.data_configs(), strict=True)
        ]
    datasets, held_out = split(datasets, config.eval_split)
    bad = BadEpisodes(datasets, config.max_bad_fraction, config.run_dir / SKIPPED, config.resume)
    say(
        f"data: {sum(len(d) for d in datasets)} episodes in {', '.join(config.dataset_classes)}"
        + (f", {sum(len(d) for d in held_out)} held out" if held_out else "")
        + (f", {len(bad)} left out (see {bad.file})" if len(bad) else "")
    )
    bad.exchange(backend)
    return datasets, held_out, bad


def data_size(config: TrainConfig) -> tuple[int, int]:
    """Height and width of the images, one for all datasets. Raises ``ConfigError``."""
    sizes = {data.image_hw for data in config.data_configs()}
    if len(sizes) > 1:
        raise ConfigError(f"the datasets have image sizes {sorted(sizes)}; give --image_size")
    return sizes.pop()


class Feed:
    """Batches of one rank, and the place in the epoch.

    Args:
        datasets, bad: of :func:`open_datasets`.
        vlm: its tokenizer and image sizes say how prompts become tokens.
    Raises:
        ConfigError: datasets of different image sizes.
        DataError: an epoch shorter than one batch, or image-text pairs that cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        backend: Backend,
        datasets: list[H5DatasetMapBase],
        bad: BadEpisodes,
        vlm: VLM,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._backend, self._say = config, backend, say
        self.bad = bad
        size = data_size(config)
        tokenize = vlm.prompt_tokenizer(size)
        pin = config.pin_memory and backend.device.type == "cuda"
        self._options = dataclasses.replace(config.loader_options(), pin_memory=pin)
        self.loader, self._sampler = build_loader(
            datasets,
            self._options,
            tokenize=tokenize,
            pad_id=tokenize.pad_id,
            rank=backend.rank,
            world_size=backend.world_size,
            pad_multiple=pad_multiple(config.use_compile),
        )
        self.loader.mixture.block_paths(bad.blocked)
        self._pairs = None
        if config.image_text_pairs is not None:
            self._pairs = ImageTextPairs(config.image_text_pairs, size, tokenize)
            say(f"image-text pairs: {len(self._pairs)} in {config.image_text_pairs}")
        self._epoch, self._epoch_samples = 0, 0

    def batches(self, iteration: int, stopwatch: Stopwatch, cache: FeatureCache | None) -> Iterator[Batch]:
        """Endless batches on the device, starting where a resumed run left its epoch.

        Args:
            iteration: steps that the run has taken.
            stopwatch: told how long each batch was waited for.
            cache: looks features up ahead of their use.
        """
        global_batch = self._config.bs * self._backend.world_size
        image_text = self._image_text(iteration)
        while True:
            self._sampler.set_epoch(self._epoch)
            self._sampler.set_start(self._epoch_samples // global_batch)
            iterator = iter(self.loader)
            if cache is not None:
                iterator = cache.ahead(iterator)
            while True:
                began = time.perf_counter()
                batch = next(iterator, None)
                if batch is not None:
                    batch.image_text = next(image_text)
                stopwatch.waited(time.perf_counter() - began)
                if batch is None:
                    break
                self._epoch_samples += global_batch
                self.bad.add(batch.skipped)
                yield recolored(batch.to(self._backend.device))
            self._epoch, self._epoch_samples = self._epoch + 1, 0

    def _image_text(self, iteration: int) -> Iterator[ImageTextBatch | None]:
        """What goes with each batch, on the CPU: image-text pairs, or endlessly nothing."""
        if self._pairs is None:
            return itertools.repeat(None)
        return image_text_batches(
            self._pairs,
            dataclasses.replace(self._options, batch_size=self._config.image_text_bs),
            start=iteration * self._config.gradient_accumulation_steps,
            rank=self._backend.rank,
            world_size=self._backend.world_size,
        )

    def exchange_bad_episodes(self) -> None:
        """Bring all ranks to the same knowledge of what cannot be used; called by all of them.

        Raises:
            DataError: on every rank, where more than the allowed share of the episodes is bad.
        """
        self.bad.exchange(self._backend)
        self.loader.mixture.block_paths(self.bad.blocked)  # what ended a process of another rank

    def position(self) -> dict[str, int]:
        """The place in the data, as a checkpoint keeps it."""
        return {
            "last_ep": self._epoch,
            "epoch_samples": self._epoch_samples,
            "epoch_length": self._sampler.epoch_length,
        }

    def go_on_from(self, start: dict) -> None:
        """Take the place that a checkpoint says; where the data have changed since, a new epoch begins.

        Raises:
            KeyError, TypeError, ValueError: it says none.
        """
        self._epoch, self._epoch_samples = int(start["last_ep"]), int(start.get("epoch_samples", 0))
        now = self._sampler.epoch_length
        length = int(start.get("epoch_length", now))
        if length != now or self._epoch_samples > length:
            self._say(f"the data have changed: {now} samples per epoch, {length} before; a new epoch begins")
            self._epoch, self._epoch_samples = self._epoch + 1, 0
