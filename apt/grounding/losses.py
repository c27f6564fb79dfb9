"""What a small vision-language model is trained on, beside the words of its answers.

Words alone taught it little in an hour on a CPU. Heads that are thrown away afterwards ask every vision token what lies
in its cell and where, and the last token of every name where what is named is: in the middle of the decoder, whose
layers action experts read, and at its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from apt.grounding.batches import GroundingBatch
from apt.model.encoders.qwen3vl import Qwen3VLEncoder

NOTHING_WEIGHT = 0.1  # of cells where nothing lies, which are most
OFFSET_WEIGHT, ABSOLUTE_WEIGHT = 4.0, 0.3
CELL_WEIGHT, MENTION_WEIGHT, EARLY_WORDS_WEIGHT = 0.5, 0.25, 0.5


@dataclass
class Judgement:
    """What a batch came to."""

    loss: torch.Tensor
    words: torch.Tensor  # (T, vocabulary), of all tokens of answers
    wanted: torch.Tensor  # (T,)
    pointed: torch.Tensor  # (M, 2) places that the mentions' last layer points to


class GroundingModel(nn.Module):
    """A small Qwen3-VL and the heads of its training.

    Args:
        model: ``Qwen3VLForConditionalGeneration``.
        names: how many names there are.
        cameras: pictures in a sequence, at most.
        bins: places along each side.
    """

    def __init__(
        self, model: nn.Module, image_statistics: tuple[list, list], names: int, cameras: int, bins: int
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(True)
        self._encoder = [Qwen3VLEncoder(model, *image_statistics)]  # in a list: its parameters are the model's own
        width, depth = model.config.text_config.hidden_size, model.config.text_config.num_hidden_layers
        self._names, self._bins, self._layers = names, bins, (depth // 2, depth - 1)
        self.cell_head = nn.Linear(width, names + 1 + 2 + 2 * bins)
        # Per layer and picture: a bin for u and v, and where in the bin.
        self.mention_heads = nn.ModuleList(nn.Linear(width, cameras * (2 * bins + 2)) for _ in self._layers)

    def forward(self, batch: GroundingBatch) -> Judgement:
        embeds, streams, _ = self._encoder[0](
            batch.images, batch.input_ids, batch.position_ids, batch.attention_mask, self._layers
        )
        is_image = batch.input_ids == self._encoder[0].image_token_id
        loss = CELL_WEIGHT * self._cell_loss(embeds[is_image], batch)
        for layer, head in zip(self._layers, self.mention_heads, strict=True):
            part, pointed = self._mention_loss(head, streams[layer], batch)
            loss = loss + MENTION_WEIGHT * part
        wanted = batch.input_ids[:, 1:][batch.is_answer[:, 1:]]
        for layer, weight in zip(self._layers, (EARLY_WORDS_WEIGHT, 1.0), strict=True):
            before = streams[layer][:, :-1][batch.is_answer[:, 1:]]
            words = self.model.lm_head(self.model.model.language_model.norm(before)).float()
            loss = loss + weight * F.cross_entropy(words, wanted)
        return Judgement(loss, words, wanted, pointed)

    def _cell_loss(self, tokens: torch.Tensor, batch: GroundingBatch) -> torch.Tensor:
        said = self.cell_head(tokens).float()
        names, offset, absolute = said.split([self._names + 1, 2, 2 * self._bins], dim=1)
        wanted, where = batch.cell_name.flatten(), batch.cell_offset.flatten(0, 1)
        there = wanted < self._names
        weight = torch.where(there, 1.0, NOTHING_WEIGHT)
        loss = (F.cross_entropy(names, wanted, reduction="none") * weight).sum() / weight.sum()
        if there.any():
            loss = loss + OFFSET_WEIGHT * (offset[there] - where[there]).abs().mean()
        images, cells = batch.cell_name.shape
        side = round(cells**0.5)
        cell = torch.arange(cells, device=said.device).repeat(images)
        corner = torch.stack([cell % side, cell // side], dim=1)
        place = (corner + torch.where(there[:, None], where, 0.5)) / side  # of an empty cell: its middle
        return loss + ABSOLUTE_WEIGHT * _bin_loss(absolute, place, self._bins)

    def _mention_loss(
        self, head: nn.Linear, stream: torch.Tensor, batch: GroundingBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Also where is pointed to, (M, 2)."""
        sequence, token, picture = batch.mention.unbind(1)
        said = head(stream[sequence, token]).float().unflatten(1, (-1, 2 * self._bins + 2))
        said = said[torch.arange(len(said)), picture]
        bins, offset = said.split([2 * self._bins, 2], dim=1)
        inside = batch.mention_place * self._bins % 1
        loss = _bin_loss(bins, batch.mention_place, self._bins) + (offset - inside).abs().mean()
        best = bins.unflatten(1, (2, -1)).argmax(-1)
        return loss, (best + offset.clamp(0, 1)) / self._bins


def _bin_loss(logits: torch.Tensor, place: torch.Tensor, bins: int) -> torch.Tensor:
    """Cross-entropy of (N, 2 * bins), u's before v's, at places (N, 2)."""
    wanted = (place * bins).long().clamp(max=bins - 1)
    return sum(F.cross_entropy(part, wanted[:, axis]) for axis, part in enumerate(logits.chunk(2, dim=1)))
