"""A Qwen3-VL of the real class at a size that trains on a CPU, and its tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from apt.model.encoders.tiny import byte_tokenizer, image_processor, small_config

# Image positions start this large: at Hugging Face's 0.02 the small vision tower never learned where it looks.
POSITION_SCALE = 0.4


@dataclass(frozen=True)
class SmallVLM:
    """Sizes. A token stands for 16 x 16 pixels."""

    width: int = 128
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    vision_width: int = 64
    vision_layers: int = 3
    bins: int = 48
    """Places along each side of an image that have a word of their own."""


def place_words(bins: int) -> list[str]:
    """The words for places: ``<x0>`` to the right, ``<y0>`` downwards."""
    return [f"<{axis}{number}>" for axis in "xy" for number in range(bins)]


def make_tokenizer(texts: Iterable[str], bins: int):
    """Bytes, merged over the words of ``texts``, and a word per place."""
    tokenizer = byte_tokenizer(sorted({word for text in texts for word in text.split()}))
    tokenizer.add_special_tokens({"additional_special_tokens": place_words(bins)})
    return tokenizer


def build(sizes: SmallVLM, tokenizer, image_size: int, seed: int) -> nn.Module:
    """``Qwen3VLForConditionalGeneration`` with fresh weights for square images of ``image_size`` pixels."""
    from transformers import Qwen3VLForConditionalGeneration

    config = small_config(
        tokenizer,
        layers=sizes.layers,
        vision_layers=sizes.vision_layers,
        image_positions=(image_size // 8) ** 2,
        deepstack=range(sizes.vision_layers),
        width=sizes.width,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        vision_width=sizes.vision_width,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        model.model.visual.pos_embed.weight.normal_(0, POSITION_SCALE)
    return model


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write a folder in Hugging Face's layout, weights in bfloat16, that ``--vlm`` takes like any other."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor(model.config).save_pretrained(folder)
