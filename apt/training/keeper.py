"""What a run leaves behind of itself, and takes up again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from apt.checkpoint import CheckpointError
from apt.configs import TrainConfig
from apt.model.vla import VLA
from apt.training.feed import Feed
from apt.training.run_dir import RunDirectory, changed_since_saved
from train_utils.backend import Backend
from train_utils.ema import EMA, saved_shadow
from train_utils.places import LATEST


class Keeper:
    """Saves a run and takes it up. Its methods are called by all ranks: each has its part of a sharded model.

    Args:
        ema: None without averaged weights.
    Attributes:
        run_dir: the main rank's, once it is open; None on the others.
        latest_score: of the present weights, the loss on held-out episodes or the last mean in training.
        best_score: the lowest that was saved.
    """

    def __init__(
        self,
        config: TrainConfig,
        backend: Backend,
        model: VLA,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        feed: Feed,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._backend, self._say = config, backend, say
        self._model, self._optimizer, self._ema, self._feed = model, optimizer, ema, feed
        self.run_dir: RunDirectory | None = None
        self.best_score, self.latest_score = float("inf"), float("inf")

    @property
    def is_best(self) -> bool:
        return self.latest_score < self.best_score

    def take_up(self, start: dict) -> int:
        """Go on from a checkpoint's place, optimizer and averaged weights; returns its iteration.

        Raises:
            CheckpointError: it does not say how far its run was.
        """
        latest = self._config.run_dir / LATEST
        try:
            iteration = int(start["current_iters"])
            self.best_score, self.latest_score = float(start["best_score"]), float(start["latest_score"])
            self._feed.go_on_from(start)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{latest} does not say how far its run was ({error!r}); start from its weights with --pretrained_ckpt"
            ) from error
        try:
            self._backend.load_optimizer_state(start, latest)
        except ValueError as error:
            self._say(f"warning: the optimizer starts fresh: {error}")
        if self._ema is not None and start.get("ema"):
            try:
                self._ema.load_state_dict(start["ema"], self._backend.split(saved_shadow(start["ema"])))
            except ValueError as error:
                self._say(f"warning: the EMA starts fresh: {error}")
        changed = changed_since_saved(self._config)
        self._say(
            f"resume: {self._config.name} at iteration {iteration}"
            + (f"; changed since it was saved: {', '.join(changed)}" if changed else "")
        )
        return iteration

    def open(self) -> None:
        """Open the run's folder, when everything else has been built."""
        self.run_dir = RunDirectory(self._config) if self._backend.is_main else None

    def save(self, iteration: int, numbered: bool) -> None:
        """Write the latest checkpoint, the best one where it is, and one that stays where it is ``numbered``.

        Raises:
            DiskFullError: it does not fit.
        """
        backend, best = self._backend, self.is_best
        self.best_score = min(self.best_score, self.latest_score)
        ema = None if self._ema is None else self._ema.state_dict(backend.join(self._ema.shadow))
        whole = backend.gathered(self._model.released_parameters())
        with whole, backend.saving(self._config.run_dir / LATEST) as optimizer_state:
            if self.run_dir is None:
                return
            content = {
                **self._model.file_content(),
                "current_iters": iteration,
                **self._feed.position(),
                "best_score": self.best_score,
                "latest_score": self.latest_score,
                "lr": self._optimizer.param_groups[0]["lr"],
                "ema": ema,
                "scheduler": {"last_epoch": iteration, "num_warmup": self._config.num_warmup},
                "scaler": None,
                **optimizer_state,
            }
            self.run_dir.save(content, numbered=numbered, best=best)

    def close(self) -> None:
        if self.run_dir is not None:
            self.run_dir.close()
