"""What a person sees of a run: lines on the terminal, numbers and pictures in TensorBoard."""

from __future__ import annotations

import resource
from collections.abc import Callable

import torch

from apt.configs import TrainConfig
from apt.model.vla import VLA
from apt.training.feature_cache import FeatureCache
from apt.training.feed import Feed
from apt.training.pictures import gate_picture, gate_table, trajectory_picture
from apt.training.run_dir import RunDirectory
from data_utils.types import Batch
from data_utils.words import format_duration
from train_utils.backend import Backend


def narrator(config: TrainConfig, backend: Backend) -> Callable[[str], None]:
    """Prints a line where this is the main process; the others keep silent."""

    def say(line: str) -> None:
        if backend.is_main:
            print(f"[stage {config.train_stage}] {line}", flush=True)

    return say


def describe(model: VLA, config: TrainConfig, backend: Backend) -> str:
    """One line on what trains where."""

    def count(module: torch.nn.Module, trained: bool) -> str:
        return f"{sum(p.numel() for p in module.parameters() if p.requires_grad == trained) / 1e6:.2f}M"

    return (
        f"train: expert {config.arch} {count(model.expert, True)} in {len(model.expert.blocks)} blocks, "
        f"VLM {config.vlm} ({model.vlm.mode}) {count(model.vlm, True)} trained + "
        f"{count(model.vlm, False)} frozen; {backend.world_size} x {backend.device.type}, "
        f"{config.bs} samples each, {'bf16' if config.fp16 else 'fp32'}"
    )


class Progress:
    """Shows the steps of a run, through its main process.

    Args:
        run_dir: where numbers and pictures go; None on the other ranks.
        say: prints a line.
    """

    def __init__(
        self,
        config: TrainConfig,
        backend: Backend,
        run_dir: RunDirectory | None,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._backend, self._run_dir, self._say = config, backend, run_dir, say

    def log(
        self,
        iteration: int,
        means: dict[str, float],
        rates: dict[str, float],
        pace: tuple[float, float],
        skipped: int,
        feed: Feed,
        cache: FeatureCache | None,
    ) -> None:
        """A status line, and the same numbers in TensorBoard.

        Args:
            means: losses and the gradient's norm since the last call.
            rates: learning rate of each group of parameters, the expert's first.
            pace: seconds a step, and the share of them spent waiting for data.
            skipped: steps without an update so far.
        """
        if self._run_dir is None:
            return
        config, device, (seconds, waiting) = self._config, self._backend.device, pace
        rate = config.bs * self._backend.world_size * config.gradient_accumulation_steps / seconds
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        values = {f"loss/{name}": means[name] for name in means if name != "grad_norm"}
        values |= {"train/grad_norm": means["grad_norm"], "train/samples_per_s": rate, "train/data_wait": waiting}
        values |= {"train/memory_gib": memory, "train/skipped_steps": skipped}
        values |= {"data/bad_episodes": len(feed.bad), "data/loader_restarts": feed.loader.restarts}
        values |= {f"lr/{name}": value for name, value in rates.items()}
        cached = ""
        if cache is not None:
            values["data/cache_hits"] = cache.hit_share()
            cached = f" cache {values['data/cache_hits']:.0%}{' (full)' if cache.is_full else ''}"
        self._run_dir.scalars(iteration, values)
        text = "".join(f"{name.replace('_', ' ')} {means[name]:.3f} " for name in ("lm", "lm_pairs") if name in means)
        left = (config.max_iterations - iteration) * seconds
        self._say(
            f"{iteration}/{config.max_iterations} loss {means['total']:.3f} (trans {means['translation']:.3f} "
            f"rot {means['rotation']:.3f} grip {means['gripper']:.3f}) {text}lr {next(iter(rates.values())):.1e} "
            f"{rate:.1f} samples/s data {waiting:.0%}{cached} mem {memory:.1f} GiB left {format_duration(left)}"
            + (f" skipped {skipped}" if skipped else "")
            + (f" bad episodes {len(feed.bad)}" if len(feed.bad) else "")
        )

    def evaluated(self, iteration: int, values: dict[str, float], best: bool) -> None:
        """What :meth:`apt.training.holdout.Holdout.evaluate` found: a line, and the same numbers in TensorBoard."""
        if self._run_dir is None:
            return
        self._run_dir.scalars(iteration, {f"eval/{name}": value for name, value in values.items()})
        self._say(
            f"{iteration}/{self._config.max_iterations} held out: loss {values['loss']:.3f} (trans "
            f"{values['translation']:.3f} rot {values['rotation']:.3f} grip {values['gripper']:.3f}) position "
            f"{values['position_cm']:.2f} cm rotation {values['rotation_deg']:.2f} deg gripper wrong "
            f"{values['gripper_wrong']:.1%}{' (best)' if best else ''}"
        )

    def draw(self, iteration: int, model: VLA, batch: Batch, generator: torch.Generator) -> None:
        """Predicted and recorded paths of a batch, and the gates. By all ranks, since a sharded model needs them all;
        they would wait for the main one anyway."""
        was_training = model.training
        model.eval()
        autocast = torch.autocast(self._backend.device.type, dtype=torch.bfloat16, enabled=self._config.fp16)
        with self._backend.gathered(model.expert.parameters()), autocast:
            predicted = model.predict(batch.observation, generator=generator)
            gates = gate_table(model.expert, self._config.vlm_layer_stride)
        model.train(was_training)
        if self._run_dir is not None:
            self._run_dir.image(iteration, "trajectories", trajectory_picture(batch, predicted))
            if gates:
                self._run_dir.image(iteration, "gates", gate_picture(gates))
