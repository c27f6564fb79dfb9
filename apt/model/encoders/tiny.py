"""A built-in Qwen3-VL of under a million parameters with random weights, for CPUs and tests.

It is saved in the Hugging Face folder layout and loaded by the code that loads the real ones. Weights are a function of
each tensor's name alone, so every machine and every rank builds the same frozen features.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data_utils.files import cache_root

_VERSION = 3  # part of the folder's name: raise when anything below changes what is built

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_WORDS = """
user assistant pick place put move take lift push pull open close turn stack pour press reach grasp drop bring hand
up down in into on onto onto under behind beside next to from the a an and then it its of with left right front back top
middle bottom red green blue yellow black white dark light wooden small big square round box bin bowl plate mug cup can
bottle milk bread cereal carton loaf soda drawer cabinet stove basket tray shelf table book block cube sauce soup cheese
butter pudding juice dressing tomato cream object gripper
"""
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}"
    "{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item.type == 'text' %}{{ item.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_qwen3vl_folder() -> Path:
    """Folder of the tiny model, built on first use. Safe when several processes ask at once."""
    folder = cache_root() / f"tiny-qwen3-vl-v{_VERSION}"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            with torch.device("cpu"):  # whatever the caller builds without memory
                save_tiny_qwen3vl(building)
            try:
                os.rename(building, folder)
            except OSError:  # another process finished first
                if not (folder / "config.json").exists():
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def save_tiny_qwen3vl(folder: Path) -> None:
    """Write model, tokenizer and image processor settings to ``folder``."""
    from safetensors.torch import save_file
    from transformers import Qwen3VLForConditionalGeneration

    tokenizer = byte_tokenizer()
    config = small_config(tokenizer, layers=4, vision_layers=4, image_positions=64, deepstack=(1, 2, 3))
    model = Qwen3VLForConditionalGeneration(config)
    _fill_weights(model)
    # Not model.save_pretrained, which in a process group writes nothing but on rank 0.
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.save_pretrained(folder)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    image_processor(config).save_pretrained(folder)


def small_config(
    tokenizer,
    layers: int,
    vision_layers: int,
    image_positions: int,
    deepstack: Sequence[int],
    width: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vision_width: int = 64,
):
    """The ``Qwen3VLConfig`` of a model for CPUs, whose tokens stand for 16 x 16 pixels: small images are enough.

    Args:
        image_positions: entries of the vision tower's position table, a square number; others are interpolated.
        deepstack: vision layers whose output is added to the first decoder layers' once more.
    """
    from transformers import Qwen3VLConfig

    token_id = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": width // heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": vision_layers,
            "patch_size": 8,
            "hidden_size": vision_width,
            "intermediate_size": 2 * vision_width,
            "num_heads": 4,
            "out_hidden_size": width,
            "num_position_embeddings": image_positions,
            "deepstack_visual_indexes": list(deepstack),
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def image_processor(config):
    """The image processor that goes with a small model: colours from [0, 1] to [-1, 1]."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=config.vision_config.patch_size,
        merge_size=config.vision_config.spatial_merge_size,
        temporal_patch_size=config.vision_config.temporal_patch_size,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        size={"shortest_edge": 65536, "longest_edge": 16777216},
    )


def byte_tokenizer(words: Sequence[str] = tuple(_WORDS.split())):
    """Bytes, merged over ``words``: any text has tokens, and what is made of these words has few."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    backend.train_from_iterator([f"{word} {word}" for word in words], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        chat_template=_CHAT_TEMPLATE,
    )


@torch.no_grad()
def _fill_weights(model: torch.nn.Module) -> None:
    """Fan-in scaled Gaussians, ones for norms, zeros for biases: random features that keep what the image holds."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            generator = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
            is_embedding = "embed" in name and parameter.ndim == 2
            std = 1.0 if is_embedding else parameter[0].numel() ** -0.5
            values = generator.standard_normal(tuple(parameter.shape), dtype=np.float32) * std
            parameter.copy_(torch.from_numpy(values))
