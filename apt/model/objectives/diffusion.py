"""The diffusion objective of the released models, sampled by DDIM or DPM-Solver++.

The schedule is diffusers' ``DDIMScheduler``'s. The samplers are its DDIM and its DPM-Solver++ (second order, multistep)
with their coefficients worked out beforehand. With ``x = a clean + s noise``, ``a^2 + s^2 = 1``, the network predicts
the noise (``epsilon``, as released), the clean action (``sample``) or ``a noise - s clean`` (``v_prediction``).
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

from apt.model.objectives.base import Objective, Schedule


class Diffusion(Objective):
    """Squared-cosine schedule, L1 error, leading spacing, eta 0.

    ``ddim`` is what policies are trained to be sampled with; ``dpm`` gets closer to it with few steps (5 to 10).
    """

    name = "ddim"
    samplers = ("ddim", "dpm")

    def __init__(self, train_timesteps: int = 100, inference_timesteps: int = 20, prediction: str = "epsilon") -> None:
        super().__init__(train_timesteps, inference_timesteps, prediction)
        self._scheduler = DDIMScheduler(
            num_train_timesteps=train_timesteps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type=prediction,
            clip_sample=False,
        )

    def draw_timesteps(
        self, count: int, device: torch.device, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        return torch.randint(self.train_timesteps, (count,), device=device, generator=generator)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self._scheduler.add_noise(clean, noise, timestep)

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if self.prediction == "v_prediction":
            return self._scheduler.get_velocity(clean, noise, timestep)
        return {"epsilon": noise, "sample": clean}[self.prediction]

    def error(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (predicted.float() - target).abs()

    def make_schedule(self, steps: int, sampler: str) -> Schedule:
        timesteps = self._timesteps(steps, sampler)
        signal = self._scheduler.alphas_cumprod.cpu().double()[timesteps].sqrt()
        noise = (1 - signal**2).sqrt()
        of_x, of_prediction = {
            "epsilon": (1 / signal, -noise / signal),
            "sample": (torch.zeros_like(signal), torch.ones_like(signal)),
            "v_prediction": (signal, -noise),
        }[self.prediction]
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
        return Schedule(timesteps, torch.stack([of_x, of_prediction, keep, move, before], dim=1).float())

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
