"""The diffusion process: noise schedule, and samplers that turn noise into actions in a few steps.

The schedule is diffusers' ``DDIMScheduler``'s. The samplers are its DDIM and its DPM-Solver++ (second order, multistep)
with their coefficients worked out beforehand: both predict the clean action from the noise and move on by a linear
combination, so a step is five multiplications and asks the device for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler

SAMPLERS = ("ddim", "dpm")


@dataclass(frozen=True)
class Schedule:
    """A sampling run: when the network is asked, and how its answers are combined.

    With ``c = coefficients[i]``, step i predicts ``clean = c0 x + c1 noise`` and moves to
    ``x' = c2 x + c3 clean + c4 clean_of_the_step_before``.
    """

    timesteps: torch.Tensor  # (steps,) int64, noisiest first
    coefficients: torch.Tensor  # (steps, 5) float32

    def to(self, device: torch.device | str) -> "Schedule":
        return Schedule(self.timesteps.to(device), self.coefficients.to(device))

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass
class Guide:
    """Actions that a sample is drawn towards, step by step (real-time chunking)."""

    target: torch.Tensor  # (B, Nee, Ta, 10)
    weight: torch.Tensor  # broadcastable to target, 0: not at all, 1: comes out equal to the target

    def apply(self, clean: torch.Tensor) -> torch.Tensor:
        return torch.lerp(clean, self.target, self.weight)


def solver_step(
    x: torch.Tensor,
    noise: torch.Tensor,
    previous: torch.Tensor,
    coefficients: torch.Tensor,
    guide: Guide | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of a :class:`Schedule`.

    Args:
        x: (B, ...) noisy actions; noise: the network's prediction for them.
        previous: clean actions predicted by the step before (zeros at first).
        coefficients: (5,), a row of the schedule's.
    Returns:
        the next, less noisy ``x`` and the clean actions predicted here.
    """
    clean_x, clean_noise, next_x, next_clean, next_previous = coefficients.unbind()
    clean = clean_x * x + clean_noise * noise
    if guide is not None:
        clean = guide.apply(clean)
    return next_x * x + next_clean * clean + next_previous * previous, clean


class Diffusion:
    """Squared-cosine schedule, noise prediction, leading spacing, eta 0.

    Args:
        train_timesteps: length of the schedule.
        inference_timesteps: denoising steps when a call does not say.
    """

    def __init__(self, train_timesteps: int = 100, inference_timesteps: int = 20) -> None:
        self.train_timesteps = train_timesteps
        self.inference_timesteps = inference_timesteps
        self._scheduler = DDIMScheduler(
            num_train_timesteps=train_timesteps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="epsilon",
            clip_sample=False,
        )
        self._schedule = functools.cache(self._make_schedule)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Noisy actions at ``timestep`` (B,); ``clean`` and ``noise`` (B, ...)."""
        return self._scheduler.add_noise(clean, noise, timestep)

    def schedule(self, steps: int | None = None, sampler: str = "ddim") -> Schedule:
        """The sampling run of ``steps`` (None: the default) by ``sampler``, on the CPU; made once.

        ``ddim`` is what policies are trained to be sampled with; ``dpm`` gets closer to it with few steps (5 to 10).
        """
        steps = self.inference_timesteps if steps is None else steps
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; choose from {', '.join(SAMPLERS)}")
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= self.train_timesteps:
            raise ValueError(f"{steps!r} denoising steps asked for; wanted 1 to {self.train_timesteps}")
        return self._schedule(steps, sampler)

    def _make_schedule(self, steps: int, sampler: str) -> Schedule:
        timesteps = self._timesteps(steps, sampler)
        signal = self._scheduler.alphas_cumprod.cpu().double()[timesteps].sqrt()
        noise = (1 - signal**2).sqrt()
        clean = torch.stack([1 / signal, -noise / signal], dim=1)
        next_signal = torch.cat([signal[1:], signal.new_ones(1)])  # the last step ends at the clean action
        next_noise = torch.cat([noise[1:], noise.new_zeros(1)])
        # DDIM, which is DPM-Solver++ of first order: keep the noise, exchange the share of signal.
        keep = next_noise / noise
        move = next_signal - signal * keep
        before = torch.zeros_like(move)
        if sampler == "dpm":
            # Second order: the clean action is extrapolated from this prediction and the one before, in log SNR. The
            # first step has none before, and the last, to infinite SNR, stays of first order.
            log_snr = (signal / noise).log()
            step = log_snr.diff()  # (steps - 1,) between successive time steps
            slope = 0.5 * step[1:] / step[:-1]  # for steps 1 to steps - 2
            before[1:-1] = -move[1:-1] * slope
            move = move - before
        return Schedule(timesteps, torch.cat([clean, torch.stack([keep, move, before], dim=1)], dim=1).float())

    def _timesteps(self, steps: int, sampler: str) -> torch.Tensor:
        """(steps,) int64, noisiest first."""
        if sampler == "ddim":
            scheduler = DDIMScheduler.from_config(self._scheduler.config)
            scheduler.set_timesteps(steps)
            return scheduler.timesteps
        # Of even, quadratic, Karras' and Lu's spacings the quadratic one came closest to 100 steps of DDIM on mixtures
        # of Gaussians; starting a little below the last time step did too, which has next to no signal.
        spaced = 0.98 * (self.train_timesteps - 1) * torch.linspace(1, 0, steps) ** 2
        return torch.maximum(spaced.round().long(), torch.arange(steps - 1, -1, -1))  # every time step once

    def sample(
        self,
        predict_noise: Callable[[torch.Tensor, int], torch.Tensor],
        noise: torch.Tensor,
        schedule: Schedule | None = None,
        guide: Guide | None = None,
    ) -> torch.Tensor:
        """Denoise from ``noise`` (B, ...); ``predict_noise(x, i)`` is asked at ``schedule.timesteps[i]``."""
        schedule = (self.schedule() if schedule is None else schedule).to(noise.device)
        x, clean = noise, torch.zeros_like(noise)
        for index, coefficients in enumerate(schedule.coefficients):
            x, clean = solver_step(x, predict_noise(x, index).to(x.dtype), clean, coefficients, guide)
        return x
