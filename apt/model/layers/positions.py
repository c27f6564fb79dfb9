"""Where a token is: rotary positions in the sequence, poses in space, sinusoids for scalars.

Both encodings act on half of every head's channels and share one interface, ``encode`` for queries, keys and values
and ``decode`` for attention's output, so that a block need not know which one it was given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROPE_TEMPERATURE = 1e4


def sinusoidal_embedding(values: torch.Tensor, width: int, temperature: float = 1000.0) -> torch.Tensor:
    """``[sin, cos]`` of each value at ``temperature^(-i / (width/2 - 1))``: (...,) to (..., width), float32."""
    half = width // 2
    exponent = torch.arange(half, device=values.device, dtype=torch.float32) / (half - 1)
    angles = values.float().unsqueeze(-1) * temperature**-exponent
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@dataclass
class RotaryEncoding:
    """RoPE (interleaved pairs) on the second half of every head, for language layers."""

    cos: torch.Tensor  # (B, L, 1, d/4)
    sin: torch.Tensor  # (B, L, 1, d/4)

    @classmethod
    def at(cls, positions: torch.Tensor, head_dim: int) -> "RotaryEncoding":
        """``positions``: (B, L) integer positions in the sequence."""
        half = head_dim // 2
        index = torch.arange(half // 2, device=positions.device, dtype=torch.float32)
        angles = positions.float().unsqueeze(-1) * ROPE_TEMPERATURE ** (-2 * index / half)
        return cls(angles.cos().unsqueeze(2), angles.sin().unsqueeze(2))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        kept, turned = x.float().chunk(2, dim=-1)
        even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([even * self.cos - odd * self.sin, odd * self.cos + even * self.sin], dim=-1)
        return torch.cat([kept, pairs.flatten(-2)], dim=-1)

    def encode(
        self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Queries, keys, values (B, L, heads, d), q or not."""
        return None if q is None else self._rotate(q), self._rotate(k), v

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        """Attention output (B, L, heads, d)."""
        return out


@dataclass
class PoseEncoding:
    """Relative poses on the first half of every head, for VA layers.

    With ``T`` a token's pose, blocks of four channels become ``T^-T q``, ``T k``, ``T v`` and ``T^-1 out``, so that
    token i sees token j through ``T_i^-1 T_j`` alone (as in GTA, Miyato et al., ICLR 2024). Kept in float32: half
    precision would round positions to millimetres.
    """

    world_from_token: torch.Tensor  # (B, L, 4, 4)
    token_from_world: torch.Tensor  # (B, L, 4, 4)

    @staticmethod
    def _apply(x: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Multiply each block of four, as a row vector, by ``right`` (B, L, 4, 4)."""
        posed, kept = x.float().chunk(2, dim=-1)
        batch, length, heads, half = posed.shape
        with torch.autocast(x.device.type, enabled=False):
            moved = posed.reshape(batch, length, heads * half // 4, 4) @ right
        return torch.cat([moved.reshape(batch, length, heads, half), kept], dim=-1)

    def encode(
        self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Queries, keys, values (B, L, heads, d), q or not."""
        world_from_token = self.world_from_token.transpose(-1, -2)
        q = None if q is None else self._apply(q, self.token_from_world)
        return q, self._apply(k, world_from_token), self._apply(v, world_from_token)

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        """Attention output (B, L, heads, d)."""
        return self._apply(out, self.token_from_world.transpose(-1, -2))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Qwen's rotary position embedding: ``x`` (B, L, heads, d), its halves turned; ``cos``, ``sin`` (B, L, 1, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
