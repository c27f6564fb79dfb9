"""Flow matching, as the pi0 and GR00T N1 papers train their action experts.

With t in [0, 1] from noise to action, ``x_t = t action + (1 - t) noise`` and the network predicts the velocity
``action - noise``; the squared error makes its answer the mean velocity, whose flow has the actions' distribution.
Training times are drawn as both papers draw them: ``(s - t) / s ~ Beta(1.5, 1)`` with s = 0.999, more often noisy than
clean. The network is told ``100 (1 - t)``, so that large is noisy and the range is that of the diffusion steps.
"""

from __future__ import annotations

import torch

from apt.model.objectives.base import Objective, Schedule

BETA_EXPONENT = 1.5
LATEST_TIME = 0.999


class FlowMatching(Objective):
    """Velocity prediction, Euler integration in equal steps."""

    name = "flow"
    samplers = ("euler",)

    def draw_timesteps(
        self, count: int, device: torch.device, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        uniform = torch.rand(count, device=device, generator=generator)
        time = LATEST_TIME * (1 - uniform ** (1 / BETA_EXPONENT))  # the inverse of Beta(a, 1)'s distribution, x^a
        return self.train_timesteps * (1 - time)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        share = (timestep / self.train_timesteps).view(-1, *[1] * (clean.ndim - 1))  # of noise
        return torch.lerp(clean, noise, share.to(clean.dtype))

    def error(self, predicted: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (predicted.float() - (clean - noise)).square()

    def make_schedule(self, steps: int, sampler: str) -> Schedule:
        left = 1 - torch.arange(steps, dtype=torch.float64) / steps  # share of noise, from 1 to 1 / steps
        part = 1 / (steps * left)  # of the way to the clean action that one step goes; all of it at last
        one, zero = torch.ones_like(left), torch.zeros_like(left)
        coefficients = torch.stack([one, left, 1 - part, part, zero], dim=1)
        return Schedule((self.train_timesteps * left).float(), coefficients.float())
