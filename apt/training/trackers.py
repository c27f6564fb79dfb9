"""Where a run's numbers and pictures go, beside its own table: TensorBoard, Weights & Biases, Trackio.

Projects, folders, keys and offline modes are the packages' own, by their own variables (``WANDB_PROJECT``,
``WANDB_MODE``, ``TRACKIO_PROJECT``, ``TRACKIO_DIR``, ...). A resumed run goes on under its name and id.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from apt.configs import NO_TRACKER, TrainConfig
from data_utils.files import read_json, write_json
from data_utils.words import one_line
from train_utils.errors import ConfigError

logger = logging.getLogger(__name__)

PROJECT = "apt"  # where the package's variable names no other
IDS_FILE = "trackers.json"  # in the run's folder


class Tracker(Protocol):
    """One of them, open."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """(H, W, 3) uint8 RGB."""

    def close(self) -> None: ...


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises ``ConfigError`` where one's package is missing."""
    for name in names:
        if name != NO_TRACKER and importlib.util.find_spec(name) is None:
            raise ConfigError(f"--report_to {name}: its package is missing; run: pip install {name}")


class Trackers:
    """All that a run reports to. What fails once training is under way is said, and left out from then on.

    Args:
        config: of the run; ``report_to`` names them.
        log_dir: of the run.
    Raises:
        ConfigError: one cannot be opened: a package, a key or a service is missing.
    """

    def __init__(self, config: TrainConfig, log_dir: Path) -> None:
        ids_file = config.run_dir / IDS_FILE
        ids = read_json(ids_file) if config.resume and ids_file.is_file() else {}
        self._open: dict[str, Tracker] = {}
        for name in config.report_to:
            if name == NO_TRACKER:
                continue
            try:
                self._open[name] = _OPENERS[name](config, log_dir, ids)
            except Exception as error:  # of many kinds, none of which the packages promise
                self.close()
                raise ConfigError(f"--report_to {name} cannot be opened: {one_line(repr(error))}") from error
        if ids:
            write_json(ids_file, ids)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._each("scalars", step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """(H, W, 3) uint8 RGB."""
        self._each("image", step, name, image)

    def close(self) -> None:
        self._each("close")

    def _each(self, what: str, *arguments) -> None:
        for name, tracker in list(self._open.items()):
            try:
                getattr(tracker, what)(*arguments)
            except Exception as error:  # training is worth more than a curve
                del self._open[name]
                logger.warning(
                    "%s has failed and gets nothing more of this run: %s",
                    name,
                    one_line(repr(error)),
                )


class _TensorBoard:
    def __init__(self, config: TrainConfig, log_dir: Path, ids: dict[str, str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(log_dir))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


class _WeightsAndBiases:
    def __init__(self, config: TrainConfig, log_dir: Path, ids: dict[str, str]) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=config.name,
            dir=str(log_dir),
            id=ids.get("wandb"),
            resume="allow",
            config=config.to_dict(),
        )
        ids["wandb"] = self._run.id
        # A run that goes on begins again at its last checkpoint: steps of wandb's own must not go back, a metric may.
        self._run.define_metric("*", step_metric="iteration")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"iteration": step, **values})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({"iteration": step, name: self._wandb.Image(image)})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, config: TrainConfig, log_dir: Path, ids: dict[str, str]) -> None:
        import trackio

        self._trackio = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=config.name,
            resume="allow" if config.resume else "never",
            config=config.to_dict(),
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._trackio.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


_OPENERS = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases, "trackio": _Trackio}
