"""A toy action expert: action tokens attend to each other and to one token, the mean of what the VLM knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from apt.model.experts.base import RobotState, VLMFeatures, VLMReads
from apt.model.experts.config import ExpertConfig
from apt.model.experts.context import VLContext
from apt.model.experts.expert import Expert
from apt.model.layers.attention import AttentionMask, SelfAttention
from apt.model.layers.mlp import GatedMLP
from apt.model.layers.norms import ModulatedRMSNorm, RMSNorm
from apt.model.layers.positions import RotaryEncoding


@dataclass
class ToyContext(VLContext):
    """What is the same at every denoising step."""

    summary: torch.Tensor  # (B, 1, h)
    mask: AttentionMask  # (B, 1, 1, 1 + A)
    rotary: RotaryEncoding  # of the summary and the action tokens, (B, 1 + A)


class ToyBlock(nn.Module):
    """Self-attention and a gated MLP, modulated by the diffusion time."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = ModulatedRMSNorm(config.width), ModulatedRMSNorm(config.width)
        self.attn = SelfAttention(config.width, config.heads, config.attention_backend)
        self.mlp = GatedMLP(config.width)

    def modulation(self, time: torch.Tensor) -> torch.Tensor:
        return torch.stack([*self.norm1.factor_and_offset(time), *self.norm2.factor_and_offset(time)], dim=1)

    def forward(self, x: torch.Tensor, context: ToyContext, modulation: torch.Tensor) -> torch.Tensor:
        """Action tokens (B, A, h) after the block; ``modulation`` (B or 1, 4, h)."""
        factor1, offset1, factor2, offset2 = modulation.unsqueeze(2).unbind(1)
        tokens = torch.cat([context.summary, self.norm1(x, factor1, offset1)], dim=1)
        q, k, v = self.attn.qkv(tokens, context.rotary)
        x = x + self.attn.attend(q[:, 1:], k, v, context.mask, context.rotary)
        return x + self.mlp(self.norm2(x, factor2, offset2))


class ToyExpert(Expert):
    """Both stages have all blocks; a VA prior is expanded by copying every tensor, as :class:`Expert` does."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__(config)
        self.vl_norm = RMSNorm(config.input_dim)
        self.proj_vl = nn.Linear(config.input_dim, config.width)
        self.blocks = nn.ModuleList(ToyBlock(config) for _ in range(config.num_layers))

    @property
    def reads(self) -> VLMReads:
        return VLMReads(hidden_states=(self.config.num_layers - 1,))

    def encode_vl(self, features: VLMFeatures, robot: RobotState) -> ToyContext:
        valid = features.valid.unsqueeze(-1)  # (B, L, 1); in Stage 1 there are vision tokens alone
        vl = self.vl_norm(features.hidden_states[self.config.num_layers - 1])
        mean = torch.where(valid, vl, 0.0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        summary = self.proj_vl(mean)
        arm = robot.valid_ee.repeat_interleave(self.steps_per_arm, dim=1)  # (B, A)
        seen = torch.cat([torch.ones_like(arm[:, :1]), arm], dim=1)
        steps = 1 + torch.arange(self.steps_per_arm, device=arm.device).repeat(robot.valid_ee.shape[1])
        positions = torch.cat([steps.new_zeros(1), steps]).expand(len(arm), -1)
        return ToyContext(
            summary,
            AttentionMask.of(seen.unsqueeze(1), summary.dtype),
            RotaryEncoding.at(positions, self.config.width // self.config.heads),
        )

    def run_blocks(self, x: torch.Tensor, context: ToyContext, modulations: torch.Tensor) -> torch.Tensor:
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, context, modulation)
        return x
