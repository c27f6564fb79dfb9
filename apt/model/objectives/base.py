"""What the network is trained to predict, and how its predictions turn noise into actions.

An objective says how noisy the actions of a training pass are, what the network predicts of them and how errors count.
For sampling it works out a :class:`Schedule`: whatever the network predicts, every sampler here makes the clean action
of it and moves on, by linear combinations, so that a step is five multiplications and asks the device for nothing.

Actions are in the numbers that the network works on (``action_scale`` of a configuration): here nobody knows of units.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """A sampling run: when the network is asked, and how its answers are combined.

    With ``c = coefficients[i]``, step i predicts ``clean = c0 x + c1 prediction`` and moves to
    ``x' = c2 x + c3 clean + c4 clean_of_the_step_before``.
    """

    timesteps: torch.Tensor  # (steps,), as the network is told them, noisiest first
    coefficients: torch.Tensor  # (steps, 5) float32

    def to(self, device: torch.device | str) -> "Schedule":
        return Schedule(self.timesteps.to(device), self.coefficients.to(device))

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass
class Guide:
    """Actions that a sample is drawn towards, step by step (real-time chunking)."""

    target: torch.Tensor  # (B, Nee, Ta, 10), clean actions
    weight: torch.Tensor  # broadcastable to target, 0: not at all, 1: comes out equal to the target

    def apply(self, clean: torch.Tensor) -> torch.Tensor:
        return torch.lerp(clean, self.target, self.weight)


def solver_step(
    x: torch.Tensor,
    prediction: torch.Tensor,
    previous: torch.Tensor,
    coefficients: torch.Tensor,
    guide: Guide | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of a :class:`Schedule`.

    Args:
        x: (B, ...) noisy actions; prediction: the network's for them.
        previous: clean actions predicted by the step before (zeros at first).
        coefficients: (5,), a row of the schedule's.
    Returns:
        the next, less noisy ``x`` and the clean actions predicted here.
    """
    clean_x, clean_prediction, next_x, next_clean, next_previous = coefficients.unbind()
    clean = clean_x * x + clean_prediction * prediction
    if guide is not None:
        clean = guide.apply(clean)
    return next_x * x + next_clean * clean + next_previous * previous, clean


class Objective(ABC):
    """One way of training and sampling.

    Args:
        train_timesteps: largest diffusion time that the network is told, and the most steps of a sampling run.
        inference_timesteps: denoising steps when a call does not say.
        prediction: what the network's answer means, one of ``PREDICTIONS`` of the registry.
    """

    #: in configurations
    name: str
    #: names of its samplers, the usual one first
    samplers: tuple[str, ...]

    def __init__(self, train_timesteps: int, inference_timesteps: int, prediction: str) -> None:
        self.train_timesteps = train_timesteps
        self.inference_timesteps = inference_timesteps
        self.prediction = prediction
        self._schedule = functools.cache(self.make_schedule)

    @abstractmethod
    def draw_timesteps(
        self, count: int, device: torch.device, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Times (count,) of training samples, as the network is told them: large is noisy."""

    @abstractmethod
    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Noisy actions at ``timestep`` (B,); ``clean`` and ``noise`` (B, ...)."""

    @abstractmethod
    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the network should answer at ``timestep`` (B,); ``clean`` and ``noise`` (B, ...)."""

    @abstractmethod
    def error(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Error of every number of the network's answer, (B, ...) float32, for the loss to average."""

    @abstractmethod
    def make_schedule(self, steps: int, sampler: str) -> Schedule:
        """The sampling run, on the CPU; arguments are checked."""

    def schedule(self, steps: int | None = None, sampler: str | None = None) -> Schedule:
        """The sampling run of ``steps`` (None: the default) by ``sampler`` (None: the usual), on the CPU; made once.

        Raises ``ValueError``."""
        steps = self.inference_timesteps if steps is None else steps
        sampler = self.samplers[0] if sampler is None else sampler
        if sampler not in self.samplers:
            raise ValueError(
                f"sampler {sampler!r} is not one of the objective {self.name!r}, by which this policy was trained; "
                f"choose from {', '.join(self.samplers)}"
            )
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= self.train_timesteps:
            raise ValueError(f"{steps!r} denoising steps asked for; wanted 1 to {self.train_timesteps}")
        return self._schedule(steps, sampler)

    def sample(
        self,
        predict: Callable[[torch.Tensor, int], torch.Tensor],
        noise: torch.Tensor,
        schedule: Schedule | None = None,
        guide: Guide | None = None,
    ) -> torch.Tensor:
        """Denoise from ``noise`` (B, ...); ``predict(x, i)`` is asked at ``schedule.timesteps[i]``."""
        schedule = (self.schedule() if schedule is None else schedule).to(noise.device)
        x, clean = noise, torch.zeros_like(noise)
        for index, coefficients in enumerate(schedule.coefficients):
            x, clean = solver_step(x, predict(x, index).to(x.dtype), clean, coefficients, guide)
        return x
