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
        bias = _rows(mask, batch, queries, keys, 0.0, dtype).masked_fill_(hidden.unsqueeze(1), float("-inf"))
        return cls(bias, sees_something.unsqueeze(-1).to(dtype))

    def for_draws(self, draws: int, length: int) -> "AttentionMask":
        """For the queries of ``draws`` draws side by side, and keys of which the first ``length`` are shared and the
        others each draw's own: (B, 1, draws * Lq, length + draws * Lk)."""
        shared, own = self.bias[..., :length], self.bias[..., length:]
        batch, _, queries, keys = own.shape
        total = length + draws * keys
        bias = _rows(own, batch, draws * queries, total, float("-inf"))
        for draw in range(draws):
            rows = bias[:, :, draw * queries : (draw + 1) * queries]
            rows[..., :length] = shared
            rows[..., length + draw * keys : length + (draw + 1) * keys] = own
        return AttentionMask(bias, torch.cat([self.sees_something] * draws, dim=1))


def _rows(
    like: torch.Tensor, batch: int, queries: int, keys: int, value: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """(batch, 1, queries, keys) of ``value`` where ``like`` is, and of its type unless another is given."""
    # A GPU's kernels want rows aligned to 8 elements, and would copy them at every call; elsewhere a row that is not
    # as long as it looks is one more layout to compile for.
    alignment = 8 if like.is_cuda else 1
    rows = like.new_full((batch, 1, queries, -(-keys // alignment) * alignment), value, dtype=dtype)
    return rows[..., :keys]


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
        on_cpu = q.device.type == "cpu" and torch.is_grad_enabled()
        out = (trainable_on_cpu if on_cpu else F.scaled_dot_product_attention)(q, k, v, bias).transpose(1, 2)
    return out if mask is None else out * mask.sees_something


def trainable_on_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As ``scaled_dot_product_attention``, whose backward pass on a CPU takes several times as long as these products;
    they keep the weights of every pair in memory."""
    batch, heads, queries, _ = q.shape
    bias = q.new_zeros(1, 1, 1) if bias is None else bias.expand(-1, heads, queries, -1).flatten(0, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, (batch, heads))


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
