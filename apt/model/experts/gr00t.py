"""A GR00T-style action expert: a diffusion transformer that cross-attends to the VLM (the GR00T N1 paper).

Blocks alternate: even ones let action tokens attend to the VLM's last selected layer, odd ones to each other. The
diffusion time modulates the norms. Action tokens count their steps by rotary positions, each arm alike.

Both stages have all blocks; a VA prior is expanded by copying every tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from apt.model.experts.base import RobotState, VLMFeatures, VLMReads
from apt.model.experts.config import ExpertConfig
from apt.model.experts.context import KeysValues, VLContext
from apt.model.experts.expert import Expert
from apt.model.layers.attention import AttentionMask, SelfAttention, attention
from apt.model.layers.mlp import GatedMLP
from apt.model.layers.norms import ModulatedRMSNorm, RMSNorm
from apt.model.layers.positions import RotaryEncoding


@dataclass
class GR00TContext(VLContext):
    """VL tokens' keys and values for each cross-attention, and what action tokens see of them and of each other."""

    keys_values: list[KeysValues]
    vl_mask: AttentionMask  # (B, 1, 1, L)
    action_mask: AttentionMask  # (B, 1, 1, A)
    rotary: RotaryEncoding


class CrossAttention(nn.Module):
    """Queries of one width, keys and values of another; q and k are RMS-normalised per head."""

    def __init__(self, width: int, vl_width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(vl_width, 2 * width)
        self.to_out = nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)

    def keys_values(self, vl: torch.Tensor) -> KeysValues:
        """Of VL tokens (B, L, C)."""
        k, v = self.to_kv(vl).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return KeysValues(self.k_norm(k).to(v.dtype), v)

    def forward(self, x: torch.Tensor, vl: KeysValues, mask: AttentionMask) -> torch.Tensor:
        """(B, A, h)"""
        q = self.q_norm(self.to_q(x).unflatten(-1, (self.heads, -1))).to(vl.values.dtype)
        return self.to_out(attention(q, vl.keys, vl.values, mask, self.backend).flatten(-2))


class GR00TBlock(nn.Module):
    """Cross-attention or self-attention, and a gated MLP."""

    def __init__(self, config: ExpertConfig, crosses: bool) -> None:
        super().__init__()
        width, heads, backend = config.width, config.heads, config.attention_backend
        self.crosses = crosses
        self.norm1, self.norm2 = ModulatedRMSNorm(width), ModulatedRMSNorm(width)
        self.attn = (
            CrossAttention(width, config.input_dim, heads, backend) if crosses else SelfAttention(width, heads, backend)
        )
        self.mlp = GatedMLP(width)

    def modulation(self, time: torch.Tensor) -> torch.Tensor:
        """Both norms' factors and offsets (B, 4, h) of the time embedding (B, h)."""
        return torch.stack([*self.norm1.factor_and_offset(time), *self.norm2.factor_and_offset(time)], dim=1)

    def forward(
        self, x: torch.Tensor, vl: KeysValues | None, context: GR00TContext, modulation: torch.Tensor
    ) -> torch.Tensor:
        """Action tokens (B, A, h) after the block; ``modulation`` (B or 1, 4, h), ``vl`` where it crosses."""
        factor1, offset1, factor2, offset2 = modulation.unsqueeze(2).unbind(1)
        normed = self.norm1(x, factor1, offset1)
        if self.crosses:
            x = x + self.attn(normed, vl, context.vl_mask)
        else:
            qkv = self.attn.qkv(normed, context.rotary)
            x = x + self.attn.attend(*qkv, context.action_mask, context.rotary)
        return x + self.mlp(self.norm2(x, factor2, offset2))


class GR00TExpert(Expert):
    """Action tokens that look at the VLM's last selected layer in every other block."""

    flow_steps = 4

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__(config)
        self.vl_norm = RMSNorm(config.input_dim)
        self.blocks = nn.ModuleList(GR00TBlock(config, index % 2 == 0) for index in range(config.num_layers))

    @property
    def reads(self) -> VLMReads:
        return VLMReads(hidden_states=(self.config.num_layers - 1,))

    def encode_vl(self, features: VLMFeatures, robot: RobotState) -> GR00TContext:
        vl = self.vl_norm(features.hidden_states[self.config.num_layers - 1])
        keys_values = [block.attn.keys_values(vl) for block in self.blocks if block.crosses]
        arms, dtype = robot.valid_ee.shape[1], keys_values[0].values.dtype
        valid = robot.valid_ee.repeat_interleave(self.steps_per_arm, dim=1)  # (B, A)
        steps = torch.arange(self.steps_per_arm, device=valid.device).repeat(arms).expand(len(valid), -1)
        return GR00TContext(
            keys_values,
            AttentionMask.of(features.valid.unsqueeze(1), dtype),
            AttentionMask.of(valid.unsqueeze(1), dtype),
            RotaryEncoding.at(steps, self.config.width // self.config.heads),
        )

    def run_blocks(self, x: torch.Tensor, context: GR00TContext, modulations: torch.Tensor) -> torch.Tensor:
        vl = iter(context.keys_values)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, next(vl) if block.crosses else None, context, modulation)
        return x
