"""Next-token cross-entropy of a VLM, on the tokens asked for alone and without all their logits at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data_utils.types import TextTargets

# Of the float32 logits of one chunk. 64 prompts of 48 tokens have 3072 targets; with 152k words their logits would be
# 1.9 GB, and as much again for their gradient. A chunk's are dropped after the forward pass and made again.
CHUNK_BYTES = 2**28
_IGNORED = -100


@dataclass
class LanguageLoss:
    """Cross-entropy in nats, summed over tokens, so that parts of a batch can be pooled."""

    total: torch.Tensor  # scalar, attached
    tokens: torch.Tensor  # scalar, how many

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.tokens.clamp(min=1)

    def __add__(self, other: "LanguageLoss") -> "LanguageLoss":
        return LanguageLoss(self.total + other.total, self.tokens + other.tokens)


def chunk_rows(vocabulary: int) -> int:
    """Targets whose logits are made at once."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def next_token_loss(
    qwen: nn.Module, stream: torch.Tensor, input_ids: torch.Tensor, targets: TextTargets
) -> LanguageLoss:
    """How well each target is predicted from what stands before it.

    Args:
        qwen: the ``Qwen3VLForConditionalGeneration`` whose final norm and head are applied.
        stream: (B, L, C), the residual stream after its last decoder layer.
        input_ids: (B, L), left-padded; the last ``targets.counts`` of each row are wanted.
    """
    suffix = min(targets.longest, input_ids.shape[1] - 1)
    place = torch.arange(suffix, device=input_ids.device)
    is_target = place >= suffix - targets.counts.unsqueeze(1)  # (B, suffix)
    wanted = torch.where(is_target, input_ids[:, input_ids.shape[1] - suffix :], _IGNORED).flatten()
    hidden = qwen.model.language_model.norm(stream[:, stream.shape[1] - 1 - suffix : -1]).flatten(0, 1)

    def summed(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = qwen.lm_head(hidden).float()
        return F.cross_entropy(logits, wanted, ignore_index=_IGNORED, reduction="sum")

    rows = chunk_rows(qwen.config.text_config.vocab_size)
    parts = [
        checkpoint(summed, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(hidden.split(rows), wanted.split(rows), strict=True)
    ]
    return LanguageLoss(torch.stack(parts).sum(), is_target.sum())
