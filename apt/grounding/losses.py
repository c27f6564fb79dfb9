"""What a small vision-language model is trained on, beside the words of its answers.

Words alone taught it little in an hour on a CPU. Heads that are thrown away afterwards ask every vision token what lies
in its cell and where, and the last token of every name where what is named is: in the middle of the decoder, whose
layers action experts read, and at its end. And one attention head per camera, in the layer below, is told where the
last token of a name should look in that camera's picture, and what it sees of any cell there must tell the place. Left
to itself it took thousands of steps to find that out, and of two pictures it looked at one only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from apt.grounding.batches import GroundingBatch
from apt.model.encoders.qwen3vl import Qwen3VLEncoder, rotate
from train_utils.errors import ConfigError

NOTHING_WEIGHT = 0.1  # of cells where nothing lies, which are most
OFFSET_WEIGHT, ABSOLUTE_WEIGHT = 4.0, 0.3
DISTANCE_WEIGHT = 4.0  # of how far off the mean of the places pointed to is, beside how unlikely the right one
CELL_WEIGHT, MENTION_WEIGHT, LOOK_WEIGHT, EARLY_WORDS_WEIGHT = 0.5, 0.25, 0.5, 0.5


@dataclass
class Judgement:
    """What a batch came to."""

    loss: torch.Tensor
    words: torch.Tensor  # (T, vocabulary), of all tokens of answers
    wanted: torch.Tensor  # (T,)
    pointed: torch.Tensor  # (M, 2) places that the mentions' last layer points to
    looked: torch.Tensor  # (M,) share of attention on the cell where it should be
    cells: torch.Tensor  # (I, G * G) int64, what the vision tower's tokens say lies in each cell


class GroundingModel(nn.Module):
    """A small Qwen3-VL and the heads of its training.

    Args:
        model: ``Qwen3VLForConditionalGeneration``.
        names: how many names there are.
        cameras: how many there are.
        bins: places along each side.
        looking_layer: decoder layer whose heads are told where to look; from it on, a name's place is known.
    """

    def __init__(
        self,
        model: nn.Module,
        image_statistics: tuple[list, list],
        names: int,
        cameras: int,
        bins: int,
        looking_layer: int,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(True)
        self._encoder = [Qwen3VLEncoder(model, *image_statistics)]  # in a list: its parameters are the model's own
        width, depth = model.config.text_config.hidden_size, model.config.text_config.num_hidden_layers
        if not 1 <= looking_layer < depth:
            raise ConfigError(f"--looking-layer is {looking_layer}; wanted 1 to {depth - 1}: a name is read before it")
        self._looking_layer = looking_layer
        self._names, self._bins, self._answering = names, bins, (depth // 2, depth - 1)
        self._layers = tuple(sorted({self._looking_layer, *self._answering}))
        heads = model.config.text_config.num_attention_heads
        if cameras > heads:
            raise ConfigError(f"{cameras} cameras want as many attention heads; the model has {heads}")
        # Spread out, so that they do not share keys where heads do.
        self.register_buffer("_looking_head", torch.arange(cameras) * heads // cameras, persistent=False)
        self.cell_head = nn.Linear(width, names + 1 + 2 + 2 * bins)
        # Per layer and camera: a bin for u and v, and where in the bin.
        self.mention_heads = nn.ModuleList(nn.Linear(width, cameras * (2 * bins + 2)) for _ in self._layers)
        self.seen_head = nn.Linear(model.config.text_config.head_dim, cameras * (2 * bins + 2))

    def forward(self, batch: GroundingBatch) -> Judgement:
        looking = self._looking_layer
        embeds, streams, keys_values = self._encoder[0](
            batch.images,
            batch.input_ids,
            batch.position_ids,
            batch.attention_mask,
            tuple(sorted({looking - 1, *self._layers})),
            (looking,),
        )
        is_image = batch.input_ids == self._encoder[0].image_token_id
        places = _cell_places(batch, self._names)
        part, cells = self._cell_loss(embeds[is_image], batch, places)
        loss = CELL_WEIGHT * part
        sequence, token, _ = batch.mention.unbind(1)
        for layer, head in zip(self._layers, self.mention_heads, strict=True):
            part, pointed = self._mention_loss(head(streams[layer][sequence, token]), batch)
            loss = loss + MENTION_WEIGHT * part
        looked, saw = self._look(streams[looking - 1], keys_values[looking], batch)
        part, _ = self._mention_loss(self.seen_head(saw), batch)
        loss = loss - LOOK_WEIGHT * looked.mean() + MENTION_WEIGHT * part
        loss = loss + ABSOLUTE_WEIGHT * self._value_loss(keys_values[looking][is_image], batch, places)
        wanted = batch.input_ids[:, 1:][batch.is_answer[:, 1:]]
        for layer, weight in zip(self._answering, (EARLY_WORDS_WEIGHT, 1.0), strict=True):
            before = streams[layer][:, :-1][batch.is_answer[:, 1:]]
            words = self.model.lm_head(self.model.model.language_model.norm(before)).float()
            loss = loss + weight * F.cross_entropy(words, wanted)
        return Judgement(loss, words, wanted, pointed, looked.exp(), cells.view_as(batch.cell_name))

    def seeing_loss(self, batch: GroundingBatch) -> torch.Tensor:
        """How badly the vision tower's tokens alone tell what lies in their cells, and where."""
        tokens, _ = self._encoder[0].see(batch.images)
        return self._cell_loss(tokens.flatten(0, 1), batch, _cell_places(batch, self._names))[0]

    def _look(
        self, stream: torch.Tensor, keys_values: torch.Tensor, batch: GroundingBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the looking heads do at each mention: logarithms of the shares of attention (M,) that they give the cell
        where they should look, and what they see (M, d)."""
        text = self.model.model.language_model
        layer = text.layers[self._looking_layer]
        attention = layer.self_attn
        sequence, token, camera = batch.mention.unbind(1)
        head = self._looking_head[camera]
        query = attention.q_proj(layer.input_layernorm(stream[sequence, token])).unflatten(-1, (-1, attention.head_dim))
        query = attention.q_norm(query)[torch.arange(len(head)), head]
        cos, sin = (part[sequence, token] for part in text.rotary_emb(stream, batch.position_ids))
        keys, values = (
            part.unflatten(-1, (-1, attention.head_dim))[sequence, :, self._shared(head)]  # (M, L, d)
            for part in keys_values.chunk(2, dim=-1)
        )
        logits = (keys @ rotate(query, cos, sin).unsqueeze(-1)).squeeze(-1) * attention.scaling
        earlier = torch.arange(logits.shape[1], device=logits.device) <= token.unsqueeze(1)
        logits = logits.float().masked_fill(~(earlier & batch.attention_mask[sequence]), float("-inf"))
        shares = logits.log_softmax(-1)
        saw = (shares.exp().unsqueeze(1) @ values.float()).squeeze(1)
        return shares.gather(1, batch.mention_seen.unsqueeze(1)).squeeze(1), saw

    def _shared(self, head: torch.Tensor) -> torch.Tensor:
        """The key-value head that a query head reads."""
        config = self.model.config.text_config
        return head // (config.num_attention_heads // config.num_key_value_heads)

    def _value_loss(self, keys_values: torch.Tensor, batch: GroundingBatch, places: torch.Tensor) -> torch.Tensor:
        """How badly values of vision tokens (I * G * G, 2 * key-value heads * d) tell their looking head the place."""
        images, cells = batch.cell_name.shape
        values = keys_values.chunk(2, dim=-1)[1].unflatten(-1, (-1, self.seen_head.in_features))
        camera = batch.image_camera.repeat_interleave(cells)
        row = torch.arange(images * cells, device=values.device)
        said = self.seen_head(values[row, self._shared(self._looking_head[camera])])
        said = said.float().unflatten(1, (-1, 2 * self._bins + 2))[row, camera]
        return _bin_loss(said[:, : 2 * self._bins], places, self._bins)

    def _cell_loss(
        self, tokens: torch.Tensor, batch: GroundingBatch, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Also what is said to lie in each cell (I * G * G,)."""
        said = self.cell_head(tokens).float()
        names, offset, absolute = said.split([self._names + 1, 2, 2 * self._bins], dim=1)
        wanted, where = batch.cell_name.flatten(), batch.cell_offset.flatten(0, 1)
        there = wanted < self._names
        weight = torch.where(there, 1.0, NOTHING_WEIGHT)
        loss = (F.cross_entropy(names, wanted, reduction="none") * weight).sum() / weight.sum()
        if there.any():
            loss = loss + OFFSET_WEIGHT * (offset[there] - where[there]).abs().mean()
        return loss + ABSOLUTE_WEIGHT * _bin_loss(absolute, places, self._bins), names.argmax(1)

    def _mention_loss(self, said: torch.Tensor, batch: GroundingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """``said``: a head's output (M, cameras * (2 * bins + 2)). Also where is pointed to, (M, 2)."""
        said = said.float().unflatten(1, (-1, 2 * self._bins + 2))[torch.arange(len(said)), batch.mention[:, 2]]
        bins, offset = said.split([2 * self._bins, 2], dim=1)
        inside = batch.mention_place * self._bins % 1
        loss = _bin_loss(bins, batch.mention_place, self._bins) + (offset - inside).abs().mean()
        best = bins.unflatten(1, (2, -1)).argmax(-1)
        return loss, (best + offset.clamp(0, 1)) / self._bins


def _cell_places(batch: GroundingBatch, names: int) -> torch.Tensor:
    """(I * G * G, 2) where what lies in a cell is in its picture; of an empty cell: its middle."""
    images, cells = batch.cell_name.shape
    side = round(cells**0.5)
    cell = torch.arange(cells, device=batch.cell_name.device).repeat(images)
    corner = torch.stack([cell % side, cell // side], dim=1)
    there = batch.cell_name.flatten() < names
    return (corner + torch.where(there[:, None], batch.cell_offset.flatten(0, 1), 0.5)) / side


def _bin_loss(logits: torch.Tensor, place: torch.Tensor, bins: int) -> torch.Tensor:
    """Of (N, 2 * bins), u's before v's, at places (N, 2): how unlikely the right bins are, which alone would teach
    nothing about near ones, and how far off the mean is."""
    wanted = (place * bins).long().clamp(max=bins - 1)
    middles = (torch.arange(bins, device=logits.device) + 0.5) / bins
    loss = logits.new_zeros(())
    for axis, part in enumerate(logits.chunk(2, dim=1)):
        mean = part.softmax(1) @ middles
        loss = loss + F.cross_entropy(part, wanted[:, axis]) + DISTANCE_WEIGHT * (mean - place[:, axis]).abs().mean()
    return loss
