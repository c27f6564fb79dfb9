"""Episodes that a run does not train on, and how well the policy foresees what happens in them.

An evaluation looks at the same frames with the same noise every time, so that its numbers differ by the weights alone,
and takes nothing from the random numbers of training.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from apt.configs import TrainConfig
from apt.model.action_scale import ACTION_DIM
from apt.model.action_transform import state_errors
from apt.model.vla import VLA, robot_state
from apt.model.vlm import VLM
from data_utils.batches.loader import build_loader
from data_utils.batches.samplers import ListedSampler, SampleKey
from data_utils.samples.dataset import H5DatasetMapBase
from data_utils.types import Batch
from train_utils.backend import Backend

NOISE_SAMPLES = 4  # noisy actions per frame that the loss is a mean over
DENOISING_STEPS = 5
_STREAM = 0x48454C44  # of random numbers, apart from training's
_GOLDEN = 0.6180339887498949  # multiples of it, less their whole parts, lie evenly in [0, 1)


def spread(datasets: Sequence[H5DatasetMapBase], count: int) -> list[SampleKey]:
    """``count`` frames, spread over the episodes of all datasets and over the frames of each."""
    ends = np.cumsum([len(dataset) for dataset in datasets])
    episodes = int(ends[-1])
    keys = []
    for draw in range(count):
        number = draw % episodes if count > episodes else draw * episodes // count
        dataset = int(np.searchsorted(ends, number, side="right"))
        episode = number - int(ends[dataset]) + len(datasets[dataset])
        visits = max(1, count // episodes + (number < count % episodes))
        share = (draw // episodes + (number + 1) * _GOLDEN % 1) / visits  # of the episode, which lies before the frame
        keys.append(SampleKey(dataset, episode, draw, frame=int(share * datasets[dataset].episode_length(episode))))
    return keys


class Holdout:
    """The held-out frames of one rank, in memory, and the evaluation of a policy on those of all ranks.

    Args:
        datasets: of the held-out episodes (``data_utils.samples.split``).
        vlm: its tokenizer says how prompts become tokens.
    Raises:
        DataError: they cannot be read.
    """

    def __init__(
        self,
        config: TrainConfig,
        backend: Backend,
        datasets: Sequence[H5DatasetMapBase],
        vlm: VLM,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._backend = config, backend
        frames = sum(int(dataset.lengths.sum()) for dataset in datasets)
        # As many on every rank, which work together.
        each = -(-min(config.eval_samples, frames) // backend.world_size)
        keys = spread(datasets, each * backend.world_size)[backend.rank :: backend.world_size]
        self._batches = _read(config, datasets, keys, vlm)
        unread = len(backend.gather([fault for batch in self._batches for fault in batch.skipped]))
        say(
            f"held out: {each * backend.world_size} frames of {sum(map(len, datasets))} episodes"
            + (f"; warning: {unread} of them could not be read, others stand in" if unread else "")
        )

    def is_due(self, iteration: int) -> bool:
        """Whether the policy is to be evaluated after ``iteration`` steps."""
        every = self._config.eval_every
        return iteration == self._config.max_iterations or (every > 0 and iteration % every == 0)

    @torch.no_grad()
    def evaluate(self, model: VLA) -> dict[str, float]:
        """Means over the frames of all ranks, which call it together: ``loss`` of the actions and its parts
        ``translation``, ``rotation`` and ``gripper``; and of sampled actions, over all steps of a chunk,
        ``position_cm``, ``rotation_deg`` and ``gripper_wrong`` (a share)."""
        backend, was_training = self._backend, model.training
        sums: dict[str, torch.Tensor] = {}
        model.eval()
        # Its shapes differ from training's; compiling for them would take longer than it saves.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.autocast(backend.device.type, dtype=torch.bfloat16, enabled=self._config.fp16):
            for number, batch in enumerate(self._batches):
                found = self._measure(model, batch.to(backend.device), self._generator(number))
                sums = {name: sums.get(name, 0) + value for name, value in found.items()}
        model.train(was_training)
        totals = backend.mean(torch.stack(list(sums.values())))
        return {name: (total / weight).item() for name, (total, weight) in zip(sums, totals, strict=True)}

    def _measure(self, model: VLA, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Of a batch: by name, a sum and how many it is of, (2,) float64."""
        observation, expert = batch.observation, model.expert
        robot = robot_state(observation)
        shape = (*robot.valid_ee.shape, model.config.num_future, ACTION_DIM)
        # A sharded model lets go of its parameters at the end of a pass: each pass gathers them anew.
        with self._whole(model):
            features = model.vlm(observation)
            loss = model(batch, generator, noise_samples=NOISE_SAMPLES, features=features).metrics()
        with self._whole(model):
            noise = torch.randn(shape, device=robot.history.device, generator=generator)
            predicted = expert.predict(features, robot, noise, DENOISING_STEPS, expert.objective.samplers[-1])
        position, rotation, gripper = state_errors(predicted, batch.future)  # (B, Ta, Nee)
        arms = robot.valid_ee.unsqueeze(1).expand_as(position)
        grippers = arms & batch.gripper_mask.unsqueeze(1)
        samples = torch.tensor(float(observation.batch_size), device=noise.device)
        sums = {"loss": loss.pop("total")} | loss
        sums = {name: (samples * value, samples) for name, value in sums.items()}
        for name, error, counted in (
            ("position_cm", 100 * position, arms),
            ("rotation_deg", rotation, arms),
            ("gripper_wrong", gripper, grippers),
        ):
            sums[name] = torch.where(counted, error, 0).sum(), counted.sum()
        return {name: torch.stack([part.double() for part in pair]) for name, pair in sums.items()}

    def _whole(self, model: VLA) -> contextlib.AbstractContextManager:
        """Context in which what a pass reads is whole on every rank."""
        parameters = {id(p): p for p in (*model.expert.parameters(), *model.bare_parameters())}
        return self._backend.gathered(parameters.values())

    def _generator(self, batch: int) -> torch.Generator:
        """Of the noise on a batch: the same in every evaluation, and in every run."""
        entropy = np.random.SeedSequence((_STREAM, batch, self._backend.rank)).generate_state(1, np.uint64)
        return torch.Generator(device=self._backend.device).manual_seed(int(entropy[0] >> 1))


def _read(
    config: TrainConfig, datasets: Sequence[H5DatasetMapBase], keys: Sequence[SampleKey], vlm: VLM
) -> list[Batch]:
    """The frames in batches on the CPU, by loader processes that end with it."""
    size = datasets[0].config.image_hw
    tokenize = vlm.prompt_tokenizer(size)
    options = config.loader_options()
    workers = min(options.workers, -(-len(keys) // options.batch_size))
    loader, _ = build_loader(
        datasets,
        dataclasses.replace(options, workers=workers, persistent_workers=False, pin_memory=False),
        tokenize=tokenize,
        pad_id=tokenize.pad_id,
        train=False,
        sampler=ListedSampler(keys, options.batch_size),
    )
    return list(loader)
