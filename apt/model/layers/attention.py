"""Attention, through one function whichever library computes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from apt.model.layers.norms import RMSNorm
from apt.model.layers.positions import PoseEncoding, RotaryEncoding


@dataclass
class AttentionMask:
    """Which keys each query may attend to, in the form the kernels want: made once, used by every layer."""

    bias: torch.Tensor  # (B, 1, Lq or 1, Lk), 0 or -inf
    sees_something: torch.Tensor  # (B, Lq or 1, 1, 1), 1 or 0

    @classmethod
    def of(cls, mask: torch.Tensor, dtype: torch.dtype) -> "AttentionMask":
        """From (B, Lq, Lk) bool, True = may attend, (B, 1, Lk) where all queries are alike; queries are ``dtype``."""
        sees_something = mask.any(-1, keepdim=True)
        # Older kernels answer NaN for a query that may see nothing: let it see everything, then zero its output.
        hidden = ~mask & sees_something
        batch, queries, keys = mask.shape
        # Rows aligned to 8 elements, which memory-efficient kernels would otherwise copy them into at every call.
        bias = torch.zeros(batch, 1, queries, -(-keys // 8) * 8, dtype=dtype, device=mask.device)[..., :keys]
        bias.masked_fill_(hidden.unsqueeze(1), float("-inf"))
        return cls(bias, sees_something.unsqueeze(-1).to(dtype))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask | None = None, backend: str = "sdpa"
) -> torch.Tensor:
    """Scaled dot-product attention; a query that may attend to nothing gets 0.

    Args:
        q: (B, Lq, heads, d); k, v: (B, Lk, heads, d).
        mask: None = everything may be attended to.
        backend: one of ``apt.model.experts.config.ATTENTION_BACKENDS``.
    Returns:
        (B, Lq, heads, d)
    """
    bias = None if mask is None else mask.bias
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        out = memory_efficient_attention(
            q, k, v, attn_bias=None if bias is None else bias.expand(-1, q.shape[2], q.shape[1], -1)
        )
    else:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2)
    return out if mask is None else out * mask.sees_something


class SelfAttention(nn.Module):
    """Projections of a self-attention layer whose queries, keys and values may be asked for separately.

    q and k are RMS-normalised per head before the position encoding. Biases on all projections.
    """

    def __init__(self, width: int, heads: int, backend: str = "sdpa") -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.to_qkv = nn.Linear(width, 3 * width)  # laid out (3, heads, d)
        self.to_out = nn.Linear(width, width)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)

    def qkv(
        self, x: torch.Tensor, encoding: RotaryEncoding | PoseEncoding
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encoded queries, keys, values (B, L, heads, d) of tokens ``x`` (B, L, h)."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        dtype = v.dtype
        q, k, v = encoding.encode(self.q_norm(q), self.k_norm(k), v)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def kv(self, x: torch.Tensor, encoding: RotaryEncoding | PoseEncoding) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`qkv` for tokens that ask nothing: the query third of the projection is not computed."""
        width = x.shape[-1]
        kv = F.linear(x, self.to_qkv.weight[width:], self.to_qkv.bias[width:])
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        dtype = v.dtype
        _, k, v = encoding.encode(None, self.k_norm(k), v)
        return k.to(dtype), v.to(dtype)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: AttentionMask | None,
        encoding: RotaryEncoding | PoseEncoding,
    ) -> torch.Tensor:
        """(B, Lq, h), after the output projection; ``encoding`` is the queries'."""
        out = attention(q, k, v, mask, self.backend)
        return self.to_out(encoding.decode(out).to(out.dtype).flatten(-2))
