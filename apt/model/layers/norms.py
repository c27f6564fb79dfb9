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

    def factor_and_offset(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``1 + scale`` and ``shift``, (B, h) each, of the time embedding (B, h)."""
        scale, shift = self.modulation(time).float().chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, x: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """``x`` (B, A, h); ``factor``, ``offset`` (B, 1, h) or (1, 1, h) from :meth:`factor_and_offset`."""
        return torch.addcmul(offset, F.rms_norm(x.float(), (x.shape[-1],), eps=RMS_EPS), factor)
