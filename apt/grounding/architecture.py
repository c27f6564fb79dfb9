"""A Qwen3-VL of the real class at a size that trains on a CPU, and its tokenizer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from apt.grounding.config import SmallVLM
from apt.grounding.places import place_words
from apt.model.encoders.tiny import byte_tokenizer, image_processor, small_config
from train_utils.errors import ConfigError

# Image positions start this large: at Hugging Face's 0.02 the small vision tower never learned where it looks.
POSITION_SCALE = 0.4


def make_tokenizer(texts: Iterable[str], bins: int):
    """Bytes, merged over the words of ``texts``, and a word per place, which data may hold like any other."""
    tokenizer = byte_tokenizer(sorted({word for text in texts for word in text.split()}))
    tokenizer.add_tokens(place_words(bins))
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


def load(folder: Path, sizes: SmallVLM, image_size: int) -> tuple:
    """Tokenizer and model of :func:`save`, in float32. Raises :class:`ConfigError` where it is of other sizes, or for
    images of another size."""
    from apt.model.encoders.hub import load_model, load_tokenizer

    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder), torch.float32)
    text, vision = model.config.text_config, model.config.vision_config
    found = {
        "width": text.hidden_size,
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "vision_width": vision.hidden_size,
        "vision_layers": vision.depth,
        "image size": round(vision.num_position_embeddings**0.5) * 8,
    }
    wanted = {**dataclasses.asdict(sizes), "image size": image_size}
    if other := [name for name, value in found.items() if value != wanted[name]]:
        said = ", ".join(f"{name} {found[name]} for {wanted[name]}" for name in other)
        raise ConfigError(f"{folder} has {said}; give these sizes, or train from fresh weights")
    if missing := [word for word in place_words(sizes.bins) if word not in tokenizer.get_vocab()]:
        raise ConfigError(f"{folder}: its tokenizer has no words for places such as {missing[0]}; give the bins it has")
    return tokenizer, model


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write a folder in Hugging Face's layout, weights in bfloat16, that ``--vlm`` takes like any other."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor(model.config).save_pretrained(folder)
