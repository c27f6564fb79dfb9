"""The trainer: ``python -m apt.train --config NAME --name RUN [--field value ...]``, alone or under torchrun.

``scripts/train.sh`` and ``scripts/finetune.sh`` are the commands users run; they call this once per stage.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from apt.checkpoint import LATEST, CheckpointError, find_checkpoint, load_checkpoint, read_config
from apt.cli import CommandLineError, parse_train_config
from apt.configs import ConfigError, TrainConfig
from apt.model.encoders.hub import VLMLoadError
from apt.model.pretrained import CheckpointMismatch, Origin
from apt.model.vla import VLA
from data_utils.batches.image_text import ImageTextPairs, image_text_batches
from data_utils.batches.loader import build_loader
from data_utils.datasets import get_dataset_class
from data_utils.errors import DataError
from data_utils.samples.device_augment import recolored
from data_utils.types import Batch, ImageTextBatch
from train_utils.backend import Backend, DDPBackend
from train_utils.bad_episodes import SKIPPED, BadEpisodes
from train_utils.deepspeed_backend import DeepSpeedBackend
from train_utils.ema import EMA, saved_shadow
from train_utils.failures import MISTAKE, RunFailed, fail, stop_with_parent
from train_utils.feature_cache import FeatureCache
from train_utils.feature_store import FeatureStore
from train_utils.metrics import MetricWindow, Stopwatch, format_duration
from train_utils.nonfinite import NonFiniteSteps
from train_utils.optim import build_optimizer, set_learning_rate
from train_utils.pictures import gate_picture, gate_table, trajectory_picture
from train_utils.plan import describe_plan
from train_utils.resume_command import VARIABLE, continue_stage
from train_utils.run_dir import RunDirectory, changed_since_saved, check_run_dir
from train_utils.stopping import StopWish

MAX_NONFINITE_STEPS = 20
# Everything a user can get wrong: reported as one line, without a traceback.
USER_ERRORS = (CommandLineError, ConfigError, CheckpointError, CheckpointMismatch, DataError, VLMLoadError)


class Trainer:
    """Builds everything a run needs, cheapest checks first, then trains.

    Args:
        config: one stage.
        backend: how processes work together.
    """

    def __init__(self, config: TrainConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend
        check_run_dir(config)
        store = None
        if config.cache_vlm_features is not None:
            store = FeatureStore(config.cache_vlm_features, 1e9 * config.cache_limit_gb)
        start = self._read_start()
        self.iteration = 0
        self.best_score, self.latest_score = float("inf"), float("inf")

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
        self.bad = BadEpisodes(datasets, config.max_bad_fraction, config.run_dir / SKIPPED, config.resume)
        self._say(
            f"data: {sum(len(d) for d in datasets)} episodes in {', '.join(config.dataset_classes)}"
            + (f", {len(self.bad)} left out (see {self.bad.file})" if len(self.bad) else "")
        )
        self.bad.exchange(backend)

        torch.manual_seed(config.seed)  # fresh weights, alike on every rank
        half = config.fp16 and backend.device.type == "cuda"
        self.model = VLA(
            config.vla_config(),
            frozen_dtype=torch.bfloat16 if half else torch.float32,
            trained_dtype=torch.bfloat16 if config.vlm_param_dtype == "bf16" else torch.float32,
            random_vlm=config.random_vlm,
        )
        if start is not None:
            self._load_weights(start)
        self.model.to(backend.device).train()
        if config.use_compile:
            self.model.expert.compile()
        self.optimizer = build_optimizer(self.model, config.max_lr, config.wd, config.vlm_lr, config.vlm_wd)
        self._plan = self.describe()  # a sharded model no longer knows its size
        self._forward = backend.prepare(self.model, self.optimizer)
        self.ema = EMA(backend.trained_parts(), config.ema_decay) if config.ema_enabled else None
        self.cache = None if store is None else FeatureCache(self.model.vlm, store, config.fp16)
        if self.cache is not None:
            self._say(str(self.cache))

        size = data_size(config)
        tokenize = self.model.vlm.prompt_tokenizer(size)
        self.loader, self.sampler = build_loader(
            datasets,
            weights=None if config.dataset_weights is None else list(config.dataset_weights),
            multiplex=config.sample_multiplex,
            batch_size=config.bs,
            workers=config.workers,
            rank=backend.rank,
            world_size=backend.world_size,
            seed=config.seed,
            tokenize=tokenize,
            pad_id=tokenize.pad_id,
            pin_memory=config.pin_memory and backend.device.type == "cuda",
            persistent_workers=config.persistent_workers,
            prefetch_factor=config.prefetch_factor,
            timeout=config.dataloader_timeout,
            sample_by=config.sample_by,
        )
        self.loader.mixture.block_paths(self.bad.blocked)
        self.pairs = None
        if config.image_text_pairs is not None:
            self.pairs = ImageTextPairs(config.image_text_pairs, size, tokenize)
            self._say(f"image-text pairs: {len(self.pairs)} in {config.image_text_pairs}")
        self.epoch, self._epoch_samples = 0, 0
        if config.resume:
            self._resume(start)
        self.run_dir = RunDirectory(config) if backend.is_main else None
        self._stop = StopWish()

    # -- starting points -------------------------------------------------------------------------------------------

    def _read_start(self) -> dict | None:
        """The checkpoint to start from, read before anything is built; None for fresh weights."""
        config = self.config
        if config.resume:
            return load_checkpoint(config.run_dir / LATEST)
        if config.pretrained_ckpt is None:
            return None
        path = find_checkpoint(config.pretrained_ckpt, config.ckpt_dir)
        content = load_checkpoint(path)
        with contextlib.suppress(CheckpointError):  # a file without its configuration is fine to start from
            upstream = read_config(path)
            for field, released in (("action_step_embedding", False), ("objective", "ddim")):
                before, now = upstream.get(field, released), getattr(config, field)
                if before != now:
                    self._say(f"warning: {path} was trained with {field}={before}, this run uses {now}")
        return content

    def _load_weights(self, start: dict) -> None:
        config = self.config
        if config.resume:
            self.model.load_weights(start["weights"], start.get("vlm_weights"), Origin.of(start))
            return
        try:
            report = self.model.load_from_pretrain(
                start["weights"], start.get("vlm_weights"), config.load_from_va, origin=Origin.of(start)
            )
        except CheckpointMismatch as error:
            raise CheckpointMismatch(f"{config.pretrained_ckpt} does not fit: {error}") from error
        self._say(
            f"start: {config.pretrained_ckpt}: {len(report.copied)} tensors copied, {len(report.fresh)} fresh, "
            f"{len(report.dropped)} dropped"
        )

    def _resume(self, start: dict) -> None:
        try:
            self.iteration, self.epoch = int(start["current_iters"]), int(start["last_ep"])
            self.best_score, self.latest_score = float(start["best_score"]), float(start["latest_score"])
            self._epoch_samples = int(start.get("epoch_samples", 0))
            length = int(start.get("epoch_length", self.sampler.epoch_length))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.config.run_dir / LATEST} does not say how far its run was ({error!r}); start from its weights "
                "with --pretrained_ckpt"
            ) from error
        if length != self.sampler.epoch_length or self._epoch_samples > length:
            now = self.sampler.epoch_length
            self._say(f"the data have changed: {now} samples per epoch, {length} before; a new epoch begins")
            self.epoch, self._epoch_samples = self.epoch + 1, 0
        try:
            self.backend.load_optimizer_state(start, self.config.run_dir / LATEST)
        except ValueError as error:
            self._say(f"warning: the optimizer starts fresh: {error}")
        if self.ema is not None and start.get("ema"):
            try:
                self.ema.load_state_dict(start["ema"], self.backend.split(saved_shadow(start["ema"])))
            except ValueError as error:
                self._say(f"warning: the EMA starts fresh: {error}")
        changed = changed_since_saved(self.config)
        self._say(
            f"resume: {self.config.name} at iteration {self.iteration}"
            + (f"; changed since it was saved: {', '.join(changed)}" if changed else "")
        )

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self, continued: str = "") -> None:
        """Train to ``max_iterations``, or until SIGTERM or SIGINT; saves either way.

        Args:
            continued: the command line that would resume this run.
        """
        config, backend = self.config, self.backend
        window, stopwatch = MetricWindow(), Stopwatch()
        nonfinite = NonFiniteSteps(backend.device)
        batches = self._batches(stopwatch)
        self._say(f"{self._plan}; iterations {self.iteration} to {self.config.max_iterations}")

        with self._stop.catching():
            while self.iteration < config.max_iterations:
                lr = set_learning_rate(self.optimizer, self.iteration, config.num_warmup)
                for micro in range(config.gradient_accumulation_steps):
                    batch = next(batches)
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
                    nonfinite.add_batch(loss.finite, batch.source)
                norm, finite = backend.step(config.grad_clip)
                self.iteration += 1
                stopwatch.step()
                nonfinite.add_step(finite)
                window.add({**loss.metrics(), "grad_norm": norm})
                if self.ema is not None and self.iteration >= config.ema_start:
                    self.ema.update()

                if self.iteration % config.log_interval == 0 or self.iteration == config.max_iterations:
                    means = window.flush(backend.mean)
                    self.latest_score = means["total"]
                    self._exchange_bad_episodes()
                    skipped, in_a_row, at_fault = nonfinite.report(backend)
                    self._log(means, lr, stopwatch.flush(), skipped)
                    if at_fault:
                        self._say(f"warning: steps with a non-finite loss or gradient were skipped: {at_fault}")
                    if in_a_row >= MAX_NONFINITE_STEPS:
                        raise RunFailed(
                            f"{in_a_row} steps in a row had a non-finite loss or gradient: {at_fault}; look at these "
                            "episodes with python -m data_utils.inspect, or resume with a lower --max_lr"
                        )
                if config.vis_interval and self.iteration % config.vis_interval == 0:
                    self._draw(batch)
                stopping = self._stop.agreed(backend)
                if stopping or self.iteration == config.max_iterations:
                    self._exchange_bad_episodes()
                    self._save(numbered=self.iteration % config.save_interval == 0)
                    break
                if self.iteration % config.save_latest_interval == 0 or self.iteration % config.save_interval == 0:
                    self._save(numbered=self.iteration % config.save_interval == 0)
        self._finish(None if self.iteration == config.max_iterations else continued)

    def _batches(self, stopwatch: Stopwatch) -> Iterator[Batch]:
        """Endless batches on the device, starting where a resumed run left its epoch."""
        global_batch = self.config.bs * self.backend.world_size
        image_text = self._image_text()
        while True:
            self.sampler.set_epoch(self.epoch)
            self.sampler.set_start(self._epoch_samples // global_batch)
            iterator = iter(self.loader)
            if self.cache is not None:
                iterator = self.cache.ahead(iterator)
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
                yield recolored(batch.to(self.backend.device))
            self.epoch, self._epoch_samples = self.epoch + 1, 0

    def _image_text(self) -> Iterator[ImageTextBatch | None]:
        """What goes with each batch, on the CPU: image-text pairs, or endlessly nothing."""
        config, backend = self.config, self.backend
        if self.pairs is None:
            return itertools.repeat(None)
        return image_text_batches(
            self.pairs,
            batch_size=config.image_text_bs,
            start=self.iteration * config.gradient_accumulation_steps,
            rank=backend.rank,
            world_size=backend.world_size,
            seed=config.seed,
            workers=config.workers,
            prefetch_factor=config.prefetch_factor,
            pin_memory=config.pin_memory and backend.device.type == "cuda",
            timeout=config.dataloader_timeout,
        )

    def _exchange_bad_episodes(self) -> None:
        self.bad.exchange(self.backend)
        self.loader.mixture.block_paths(self.bad.blocked)  # what ended a process of another rank

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
        if self.run_dir is not None:
            self.run_dir.close()
        if continued is None:
            self._say(f"done: {self.config.run_dir / LATEST} at iteration {self.iteration}")
        else:
            self._say(f"stopped at iteration {self.iteration}, saved; resume with: {continued}")

    # -- what a person sees ----------------------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        if self.backend.is_main:
            print(f"[stage {self.config.train_stage}] {line}", flush=True)

    def describe(self) -> str:
        """One line on what trains where."""

        def count(module: torch.nn.Module, trained: bool) -> str:
            return f"{sum(p.numel() for p in module.parameters() if p.requires_grad == trained) / 1e6:.2f}M"

        model, backend = self.model, self.backend
        return (
            f"train: expert {self.config.arch} {count(model.expert, True)} in {len(model.expert.blocks)} blocks, "
            f"VLM {self.config.vlm} ({model.vlm.mode}) {count(model.vlm, True)} trained + "
            f"{count(model.vlm, False)} frozen; {backend.world_size} x {backend.device.type}, "
            f"{self.config.bs} samples each, {'bf16' if self.config.fp16 else 'fp32'}"
        )

    def _log(self, means: dict[str, float], lr: float, pace: tuple[float, float], skipped: int) -> None:
        seconds, waiting = pace
        if self.run_dir is None:
            return
        config, device = self.config, self.backend.device
        rate = config.bs * self.backend.world_size * config.gradient_accumulation_steps / seconds
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        values = {f"loss/{name}": means[name] for name in means if name != "grad_norm"}
        values |= {"train/grad_norm": means["grad_norm"], "train/samples_per_s": rate, "train/data_wait": waiting}
        values |= {"train/memory_gib": memory, "train/skipped_steps": skipped}
        values |= {"data/bad_episodes": len(self.bad), "data/loader_restarts": self.loader.restarts}
        values |= {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        cached = ""
        if self.cache is not None:
            values["data/cache_hits"] = self.cache.hit_share()
            cached = f" cache {values['data/cache_hits']:.0%}{' (full)' if self.cache.is_full else ''}"
        self.run_dir.scalars(self.iteration, values)
        text = "".join(f"{name.replace('_', ' ')} {means[name]:.3f} " for name in ("lm", "lm_pairs") if name in means)
        left = (config.max_iterations - self.iteration) * seconds
        self._say(
            f"{self.iteration}/{config.max_iterations} loss {means['total']:.3f} (trans {means['translation']:.3f} "
            f"rot {means['rotation']:.3f} grip {means['gripper']:.3f}) {text}lr {lr:.1e} {rate:.1f} samples/s "
            f"data {waiting:.0%}{cached} mem {memory:.1f} GiB left {format_duration(left)}"
            + (f" skipped {skipped}" if skipped else "")
            + (f" bad episodes {len(self.bad)}" if len(self.bad) else "")
        )

    def _draw(self, batch: Batch) -> None:
        """By all ranks, since a sharded model needs them all; they would wait for the main one anyway."""
        was_training = self.model.training
        self.model.eval()
        with self.backend.gathered(self.model.expert.parameters()), self._autocast():
            predicted = self.model.predict(batch.observation, generator=self._generator(micro=0))
            gates = gate_table(self.model.expert, self.config.vlm_layer_stride)
        self.model.train(was_training)
        if self.run_dir is not None:
            self.run_dir.image(self.iteration, "trajectories", trajectory_picture(batch, predicted))
            if gates:
                self.run_dir.image(self.iteration, "gates", gate_picture(gates))

    def _save(self, numbered: bool) -> None:
        """By all ranks: each has its part of a sharded model; the main one writes the checkpoint."""
        backend, best = self.backend, self.latest_score < self.best_score
        self.best_score = min(self.best_score, self.latest_score)
        ema = None if self.ema is None else self.ema.state_dict(backend.join(self.ema.shadow))
        whole = backend.gathered(self.model.released_parameters())
        with whole, backend.saving(self.config.run_dir / LATEST) as optimizer_state:
            if self.run_dir is None:
                return
            content = {
                **self.model.origin.entries(),
                "weights": self.model.released_weights(),
                "current_iters": self.iteration,
                "last_ep": self.epoch,
                "epoch_samples": self._epoch_samples,
                "epoch_length": self.sampler.epoch_length,
                "best_score": self.best_score,
                "latest_score": self.latest_score,
                "lr": self.optimizer.param_groups[0]["lr"],
                "ema": ema,
                "scheduler": {"last_epoch": self.iteration, "num_warmup": self.config.num_warmup},
                "scaler": None,
                **optimizer_state,
            }
            if vlm_weights := self.model.released_vlm_weights():
                content["vlm_weights"] = vlm_weights
            self.run_dir.save(content, numbered=numbered, best=best)


def data_size(config: TrainConfig) -> tuple[int, int]:
    """Height and width of the images, one for all datasets. Raises ``ConfigError``."""
    sizes = {data.image_hw for data in config.data_configs()}
    if len(sizes) > 1:
        raise ConfigError(f"the datasets have image sizes {sorted(sizes)}; give --image_size")
    return sizes.pop()


def select_backend(config: TrainConfig) -> Backend:
    """Raises ``ConfigError`` or ``ValueError`` where it cannot run here."""
    return DeepSpeedBackend(config) if config.backend == "deepspeed" else DDPBackend(config.device)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    stop_with_parent()
    try:
        config = parse_train_config([argument for argument in argv if argument != "--dry-run"])
        if "--dry-run" in argv:
            check_run_dir(config)
            print(describe_plan(config, int(os.environ.get("WORLD_SIZE", 1))))
            return 0
        backend = select_backend(config)
    except (*USER_ERRORS, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    try:
        Trainer(config, backend).run(os.environ.get(VARIABLE) or continue_stage(argv))
        backend.close()
    except Exception as error:
        return fail(error, USER_ERRORS)
    except KeyboardInterrupt:
        print("error: interrupted before it could save", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
