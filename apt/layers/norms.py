"""RMS normalisation, plain and modulated by the diffusion time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

RMS_EPS = 1e-6


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight over the last dimension; computed in float32 under autocast."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), RMS_EPS)


class ModulatedRMSNorm(nn.Module):
    """RMSNorm without weight, scaled and shifted by the diffusion time: ``norm(x) * (1 + scale) + shift``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """``x`` (B, A, h); ``modulation`` (B, 2h), this norm's ``self.modulation`` of the time embedding."""
        scale, shift = modulation.float().unsqueeze(1).chunk(2, dim=-1)
        return torch.addcmul(shift, F.rms_norm(x.float(), (x.shape[-1],), eps=RMS_EPS), 1 + scale)
