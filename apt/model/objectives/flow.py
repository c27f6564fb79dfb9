"""Flow matching, as the pi0 and GR00T N1 papers train their action experts.

With t in [0, 1] from noise to action, ``x_t = t action + (1 - t) noise``, and the flow along the mean velocity
``action - noise`` at x_t has the actions' distribution. The network predicts that velocity (``velocity``, as in the
papers) or the mean action (``sample``), of which the velocity follows: ``(action - x_t) / (1 - t)``. A squared error
makes either answer the mean. That of ``sample`` stays the action's own: as the velocity's it would be weighted by
``1 / (1 - t)^2``, and actions with next to no noise, which teach nothing, would make up nearly all of it. Nor does
sampling ask for that weight: an Euler step moves a part of the way to the predicted action, the last one all of it.

Training times are drawn as both papers draw them: ``(s - t) / s ~ Beta(1.5, 1)`` with s = 0.999, more often noisy than
clean. The network is told ``100 (1 - t)``, so that large is noisy and the range is that of the diffusion steps.
"""

from __future__ import annotations

import torch

from apt.model.objectives.base import Objective, Schedule

BETA_EXPONENT = 1.5
LATEST_TIME = 0.999


class FlowMatching(Objective):
    """Squared error, Euler integration in equal steps."""

    name = "flow"
    samplers = ("euler",)

    def __init__(self, train_timesteps: int = 100, inference_timesteps: int = 10, prediction: str = "velocity") -> None:
        super().__init__(train_timesteps, inference_timesteps, prediction)

    def draw_timesteps(
        self, count: int, device: torch.device, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        uniform = torch.rand(count, device=device, generator=generator)
        time = LATEST_TIME * (1 - uniform ** (1 / BETA_EXPONENT))  # the inverse of Beta(a, 1)'s distribution, x^a
        return self.train_timesteps * (1 - time)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        share = (timestep / self.train_timesteps).view(-1, *[1] * (clean.ndim - 1))  # of noise
        return torch.lerp(clean, noise, share.to(clean.dtype))

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return {"velocity": clean - noise, "sample": clean}[self.prediction]

    def error(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (predicted.float() - target).square()

    def make_schedule(self, steps: int, sampler: str) -> Schedule:
        left = 1 - torch.arange(steps, dtype=torch.float64) / steps  # share of noise, from 1 to 1 / steps
        part = 1 / (steps * left)  # of the way to the clean action that one step goes; all of it at last
        one, zero = torch.ones_like(left), torch.zeros_like(left)
        of_x, of_prediction = {"velocity": (one, left), "sample": (zero, one)}[self.prediction]
        coefficients = torch.stack([of_x, of_prediction, 1 - part, part, zero], dim=1)
        return Schedule((self.train_timesteps * left).float(), coefficients.float())
