"""The two feed-forward shapes of the action expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Sequential):
    """Linear, LayerNorm, exact GELU, Linear."""

    def __init__(self, inputs: int, width: int, zero_init_last: bool = False) -> None:
        super().__init__(nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-5), nn.GELU(), nn.Linear(width, width))
        if zero_init_last:
            nn.init.zeros_(self[-1].weight)
            nn.init.zeros_(self[-1].bias)


class GatedMLP(nn.Module):
    """``down(gelu_tanh(gate(x)) * up(x))``, twice as wide inside, no biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
