"""One stage of training, from the configuration to the last checkpoint."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from apt.configs import TrainConfig
from apt.model.compilation import allow_variants
from apt.training.feature_cache import FeatureCache
from apt.training.feed import Feed, open_datasets
from apt.training.holdout import Holdout
from apt.training.keeper import Keeper
from apt.training.progress import Progress, describe, narrator
from apt.training.run_dir import check_run_dir
from apt.training.shared_memory import check_shared_memory
from apt.training.start import build_model, load_start, read_start
from data_utils.types import Batch
from train_utils.backend import Backend
from train_utils.ema import EMA
from train_utils.errors import RunFailed
from train_utils.feature_store import FeatureStore
from train_utils.metrics import MetricWindow, Stopwatch
from train_utils.nonfinite import NonFiniteSteps
from train_utils.optim import build_optimizer, set_learning_rate
from train_utils.places import LATEST
from train_utils.stopping import StopWish

MAX_NONFINITE_STEPS = 20


class Trainer:
    """Builds everything a run needs, cheapest checks first, then trains.

    Args:
        config: one stage.
        backend: how processes work together.
    """

    def __init__(self, config: TrainConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend
        self._say = narrator(config, backend)
        check_run_dir(config)
        check_shared_memory(config)
        store = None
        if config.cache_vlm_features is not None:
            store = FeatureStore(config.cache_vlm_features, 1e9 * config.cache_limit_gb)
        start = read_start(config, self._say)
        datasets, held_out, bad = open_datasets(config, backend, self._say)

        self.model = build_model(config, on_gpu=backend.device.type == "cuda")
        if start is not None:
            load_start(self.model, start, config, self._say)
        self.model.to(backend.device).train()
        if config.use_compile:
            allow_variants()
            self.model.expert.compile(dynamic=False)  # of ever other prompt lengths one graph would take minutes
        self.optimizer = build_optimizer(self.model, config.max_lr, config.wd, config.vlm_lr, config.vlm_wd)
        plan = describe(self.model, config, backend)  # a sharded model no longer knows its size
        self._forward = backend.prepare(self.model, self.optimizer)
        self.ema = EMA(backend.trained_parts(), config.ema_decay) if config.ema_enabled else None
        self.cache = None if store is None else FeatureCache(self.model.vlm, store, config.fp16)
        if self.cache is not None:
            self._say(str(self.cache))

        self.feed = Feed(config, backend, datasets, bad, self.model.vlm, self._say)
        self.holdout = Holdout(config, backend, held_out, self.model.vlm, self._say) if held_out else None
        self.keeper = Keeper(config, backend, self.model, self.optimizer, self.ema, self.feed, self._say)
        self.iteration = self.keeper.take_up(start) if config.resume else 0
        self._window, self._stopwatch = MetricWindow(), Stopwatch()
        self._nonfinite = NonFiniteSteps(backend.device)
        self._batches = self.feed.batches(self.iteration, self._stopwatch, self.cache)
        self.keeper.open()
        self._progress = Progress(config, backend, self.keeper.run_dir, self._say)
        self._stop = StopWish()
        self._say(f"{plan}; iterations {self.iteration} to {config.max_iterations}")

    def run(self, continued: str = "") -> None:
        """Train to ``max_iterations``, or until SIGTERM or SIGINT; saves either way.

        Args:
            continued: the command line that would resume this run.
        Raises:
            DataError: too many episodes turned out to be bad.
            RunFailed: losses stay non-finite.
            DiskFullError: a checkpoint does not fit.
        """
        config = self.config
        with self._stop.catching():
            while self.iteration < config.max_iterations:
                batch = self._step()
                is_last = self.iteration == config.max_iterations
                if self.iteration % config.log_interval == 0 or is_last:
                    self._report()
                if config.vis_interval and self.iteration % config.vis_interval == 0:
                    self._progress.draw(self.iteration, self.model, batch, self._generator(micro=0))
                is_best = self.holdout is not None and self.holdout.is_due(self.iteration) and self._evaluate()
                stopping = self._stop.agreed(self.backend)
                numbered = self.iteration % config.save_interval == 0
                if stopping or is_last:
                    self.feed.exchange_bad_episodes()
                    self.keeper.save(self.iteration, numbered)
                    break
                if is_best or numbered or self.iteration % config.save_latest_interval == 0:
                    self.keeper.save(self.iteration, numbered)
        self._finish(None if self.iteration == config.max_iterations else continued)

    def _step(self) -> Batch:
        """One update from ``gradient_accumulation_steps`` batches; returns the last of them."""
        config, backend = self.config, self.backend
        set_learning_rate(
            self.optimizer, self.iteration, config.num_warmup, config.num_decay, config.max_iterations - 1
        )
        for micro in range(config.gradient_accumulation_steps):
            batch = next(self._batches)
            is_last = micro == config.gradient_accumulation_steps - 1
            with backend.accumulating(is_last), self._autocast():
                loss = self._forward(
                    batch,
                    generator=self._generator(micro),
                    pose_noise=config.robot_pose_aug,
                    camera_view_dropout=config.camera_view_dropout,
                    noise_samples=config.noise_samples_per_obs,
                    features=None if self.cache is None else self.cache.features(batch),
                )
                backend.backward(loss.total / config.gradient_accumulation_steps)
            self._nonfinite.add_batch(loss.finite, batch.source)
        norm, finite = backend.step(config.grad_clip)
        self.iteration += 1
        self._stopwatch.step()
        self._nonfinite.add_step(finite)
        self._window.add({**loss.metrics(), "grad_norm": norm})
        if self.ema is not None and self.iteration >= config.ema_start:
            self.ema.update()
        return batch

    def _report(self) -> None:
        """Bring together what all ranks know, show it, and end a run that has gone astray."""
        means = self._window.flush(self.backend.mean)
        if self.holdout is None:
            self.keeper.latest_score = means["total"]
        self.feed.exchange_bad_episodes()
        skipped, in_a_row, at_fault = self._nonfinite.report(self.backend)
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        pace = self._stopwatch.flush()
        self._progress.log(self.iteration, means, rates, pace, skipped, self.feed, self.cache)
        if at_fault:
            self._say(f"warning: steps with a non-finite loss or gradient were skipped: {at_fault}")
        if in_a_row >= MAX_NONFINITE_STEPS:
            raise RunFailed(
                f"{in_a_row} steps in a row had a non-finite loss or gradient: {at_fault}; look at these "
                "episodes with python -m data_utils.inspect, or resume with a lower --max_lr"
            )

    def _evaluate(self) -> bool:
        """On the held-out episodes; whether the policy is the best of this run so far."""
        with self._stopwatch.paused():
            values = self.holdout.evaluate(self.model)
        self.keeper.latest_score = values["loss"]
        self._progress.evaluated(self.iteration, values, self.keeper.is_best)
        return self.keeper.is_best

    def _generator(self, micro: int) -> torch.Generator:
        """All randomness of a step follows from (seed, iteration, micro-batch, rank): a resumed run repeats it."""
        entropy = (self.config.seed, self.iteration, micro, self.backend.rank)
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator(device=self.backend.device).manual_seed(seed)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.backend.device.type, dtype=torch.bfloat16, enabled=self.config.fp16)

    def _finish(self, continued: str | None) -> None:
        if self.cache is not None:
            self.cache.close()
        self.backend.barrier()
        self.keeper.close()
        if continued is None:
            self._say(f"done: {self.config.run_dir / LATEST} at iteration {self.iteration}")
        else:
            self._say(f"stopped at iteration {self.iteration}, saved; resume with: {continued}")
