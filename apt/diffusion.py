"""The diffusion process: noise schedule and sampler, both diffusers' ``DDIMScheduler``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler


class Diffusion:
    """DDIM over actions: squared-cosine schedule, noise prediction, leading spacing, eta 0.

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

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Noisy actions at ``timestep`` (B,); ``clean`` and ``noise`` (B, ...)."""
        return self._scheduler.add_noise(clean, noise, timestep)

    def timesteps(self, steps: int | None = None) -> torch.Tensor:
        """Schedule of a sampling run on the CPU, noisiest first: (steps,) int64."""
        steps = self.inference_timesteps if steps is None else steps
        if not 1 <= steps <= self.train_timesteps:
            raise ValueError(f"{steps} denoising steps asked for; wanted 1 to {self.train_timesteps}")
        scheduler = DDIMScheduler.from_config(self._scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler.timesteps

    def sample(
        self, predict_noise: Callable[[torch.Tensor, int], torch.Tensor], noise: torch.Tensor, steps: int | None = None
    ) -> torch.Tensor:
        """Denoise from ``noise`` (B, ...); ``predict_noise(x, index)`` is asked at ``self.timesteps(steps)[index]``."""
        timesteps = self.timesteps(steps)
        scheduler = DDIMScheduler.from_config(self._scheduler.config)
        scheduler.set_timesteps(len(timesteps))
        x = noise
        for index, timestep in enumerate(timesteps.tolist()):
            x = scheduler.step(predict_noise(x, index).to(x.dtype), timestep, x).prev_sample
        return x
