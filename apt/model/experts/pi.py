"""A pi-style action expert: a second set of transformer weights beside the VLM's (the pi0 and pi0.5 papers).

There is a block for each selected decoder layer. Its action tokens attend jointly to that layer's own keys and values
and to each other, as if they stood behind the VLM's tokens: with the VLM's heads, head width and rotary positions, but
projections, norms and MLP of their own, at the expert's width. The diffusion time modulates the norms, as in pi0.5.

Both stages have all blocks; a VA prior is expanded by copying every tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from apt.model.experts.base import RobotState, VLMFeatures, VLMReads
from apt.model.experts.config import ExpertConfig, VLMAttention
from apt.model.experts.context import KeysValues, KeysValuesBuffer, VLContext
from apt.model.experts.expert import Expert
from apt.model.layers.attention import AttentionMask, attention
from apt.model.layers.mlp import GatedMLP
from apt.model.layers.norms import ModulatedRMSNorm, RMSNorm
from apt.model.layers.positions import rotate


@dataclass
class Rotary:
    """The VLM's rotary positions of action tokens."""

    cos: torch.Tensor  # (B, A, 1, d)
    sin: torch.Tensor

    @classmethod
    def at(cls, positions: torch.Tensor, shape: VLMAttention) -> "Rotary":
        """``positions``: (B, A), of text: the same on all three axes of the VLM's."""
        half = torch.arange(shape.head_dim // 2, device=positions.device, dtype=torch.float32)
        angles = positions.float().unsqueeze(-1) * shape.rope_theta ** (-2 * half / shape.head_dim)
        both = torch.cat([angles, angles], dim=-1).unsqueeze(2)
        return cls(both.cos(), both.sin())


@dataclass
class PiContext(VLContext):
    """The VLM's keys and values, a layer each, and which of them action tokens see."""

    keys_values: list[KeysValues | KeysValuesBuffer]
    mask: AttentionMask  # (B, 1, 1, L + A), of all action queries alike
    rotary: Rotary

    def with_buffers(self) -> "PiContext":
        tokens = self.rotary.cos.shape[1]
        buffers = [layer.with_room(tokens) for layer in self.keys_values]
        return PiContext(buffers, self.mask, self.rotary)


class PiBlock(nn.Module):
    """Joint attention and gated MLP for action tokens."""

    def __init__(self, width: int, shape: VLMAttention, backend: str) -> None:
        super().__init__()
        self.shape, self.backend = shape, backend
        self.norm1, self.norm2 = ModulatedRMSNorm(width), ModulatedRMSNorm(width)
        self.to_q = nn.Linear(width, shape.heads * shape.head_dim)
        self.to_kv = nn.Linear(width, 2 * shape.kv_heads * shape.head_dim)
        self.to_out = nn.Linear(shape.heads * shape.head_dim, width)
        self.q_norm, self.k_norm = RMSNorm(shape.head_dim), RMSNorm(shape.head_dim)
        self.mlp = GatedMLP(width)

    def modulation(self, time: torch.Tensor) -> torch.Tensor:
        """Both norms' factors and offsets (B, 4, h) of the time embedding (B, h)."""
        return torch.stack([*self.norm1.factor_and_offset(time), *self.norm2.factor_and_offset(time)], dim=1)

    def forward(
        self,
        x: torch.Tensor,
        context: KeysValues | KeysValuesBuffer,
        modulation: torch.Tensor,
        rotary: Rotary,
        mask: AttentionMask,
    ) -> torch.Tensor:
        """Action tokens (B, A, h) after the block; ``modulation`` (B or 1, 4, h)."""
        factor1, offset1, factor2, offset2 = modulation.unsqueeze(2).unbind(1)
        shape, normed = self.shape, self.norm1(x, factor1, offset1)
        q = self.to_q(normed).unflatten(-1, (shape.heads, -1))
        k, v = self.to_kv(normed).unflatten(-1, (2, shape.kv_heads, -1)).unbind(-3)
        dtype = v.dtype
        q = rotate(self.q_norm(q), rotary.cos, rotary.sin).to(dtype)
        k = rotate(self.k_norm(k), rotary.cos, rotary.sin).to(dtype)
        # Query heads that share a key become queries of one head: keys and values are not repeated for them.
        batch, tokens, groups = *q.shape[:2], shape.heads // shape.kv_heads
        q = q.unflatten(2, (shape.kv_heads, groups)).transpose(2, 3).flatten(1, 2)  # (B, A * groups, kv_heads, d)
        out = attention(q, *context.joined(k, v), mask, self.backend)
        out = out.view(batch, tokens, groups, shape.kv_heads, -1).transpose(2, 3).flatten(2)
        x = x + self.to_out(out)
        return x + self.mlp(self.norm2(x, factor2, offset2))


class PiExpert(Expert):
    """Action tokens beside the VLM's, layer by layer."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__(config)
        if config.vlm_attention is None:
            raise ValueError("arch 'pi' joins the VLM's attention: its configuration must give vlm_attention")
        self.blocks = nn.ModuleList(
            PiBlock(config.width, config.vlm_attention, config.attention_backend) for _ in range(config.num_layers)
        )

    @property
    def reads(self) -> VLMReads:
        return VLMReads(keys_values=tuple(range(self.config.num_layers)))

    def encode_vl(self, features: VLMFeatures, robot: RobotState) -> PiContext:
        shape, arms = self.config.vlm_attention, robot.valid_ee.shape[1]
        dtype = features.keys_values[0][0].dtype
        if torch.is_autocast_enabled(features.modality.device.type):
            dtype = torch.get_autocast_dtype(features.modality.device.type)
        visible = torch.cat([features.valid, robot.valid_ee.repeat_interleave(self.steps_per_arm, dim=1)], dim=1)
        steps = torch.arange(self.steps_per_arm, device=features.modality.device).repeat(arms)  # every arm alike
        return PiContext(
            [KeysValues(keys.to(dtype), values.to(dtype)) for keys, values in features.keys_values.values()],
            AttentionMask.of(visible.unsqueeze(1), dtype),
            Rotary.at(features.rotary_end.unsqueeze(1) + steps, shape),
        )

    def run_blocks(self, x: torch.Tensor, context: PiContext, modulations: torch.Tensor) -> torch.Tensor:
        for block, keys_values, modulation in zip(self.blocks, context.keys_values, modulations, strict=True):
            x = block(x, keys_values, modulation, context.rotary, context.mask)
        return x
