"""Qwen3-VL-2B's published sizes as a folder, whole or a quarter as wide, for benchmarks without the weights.

The folder holds a configuration, the built-in byte tokenizer and the image processor's settings, no weights: use it
with random ones (``--random-vlm``, ``VLA(..., random_vlm=True)``).
"""

from __future__ import annotations

import json
from pathlib import Path

from apt.model.encoders.tiny import byte_tokenizer

SIZES = {"qwen3-vl-2b-sizes": 1, "qwen3-vl-2b-quarter": 4}  # name -> what widths are divided by


def qwen3_vl_2b_folder(parent: Path, name: str = "qwen3-vl-2b-sizes") -> Path:
    """Write ``parent/name`` and return it.

    Widths, depths, heads and vocabulary are those of Qwen/Qwen3-VL-2B-Instruct (its config.json); only the ids of the
    image tokens differ, since they are the built-in tokenizer's. ``qwen3-vl-2b-quarter`` has a quarter of every width
    and of the heads: beside a ``tiny`` expert it takes the share of the work that the whole one takes beside ``base``.
    """
    shrink = SIZES[name]
    folder = Path(parent) / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    token_id = tokenizer.convert_tokens_to_ids
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": 151936 // shrink,
            "hidden_size": 2048 // shrink,
            "intermediate_size": 6144 // shrink,
            "num_hidden_layers": 28,
            "num_attention_heads": 16 // shrink,
            "num_key_value_heads": 8 // shrink,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 24,
            "hidden_size": 1024 // shrink,
            "intermediate_size": 4096 // shrink,
            "num_heads": 16 // shrink,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 2048 // shrink,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "tie_word_embeddings": True,
    }
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    return folder
