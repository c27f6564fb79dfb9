"""Qwen3-VL by name or folder: configuration, tokenizer, image statistics, model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

TINY_NAME = "tiny"


class VLMLoadError(ValueError):
    """A vision-language model that cannot be loaded; the message names it and says what to do."""


SHIPPED = {"blocks": Path(__file__).resolve().parents[3] / "assets" / "models" / "blocks_vlm"}
"""Small VLMs that come with the library, by the names that stand for them."""


def resolve(name: str) -> str:
    """``tiny`` and the names of :data:`SHIPPED` to their folders; any other name or path as it is."""
    if name == TINY_NAME:
        from apt.model.encoders.tiny import tiny_qwen3vl_folder  # torch is behind it: seconds

        return str(tiny_qwen3vl_folder())
    return str(SHIPPED.get(name, name))


def _load(loader, name: str, what: str, **options):
    from transformers.utils import logging

    if name == TINY_NAME or name in SHIPPED:
        logging.disable_progress_bar()
    try:
        return loader(resolve(name), **options)
    except (OSError, ValueError, KeyError) as error:
        local = Path(name).exists()
        if name in SHIPPED and not SHIPPED[name].exists():
            raise VLMLoadError(
                f"VLM {name!r} comes with a clone of the repository (assets/models), not with the installed package: "
                "give its folder"
            ) from error
        hint = (
            "the folder must hold a Qwen3-VL in Hugging Face's layout (config.json, safetensors, tokenizer)"
            if local
            else "it is neither a local folder nor to be had from the Hugging Face Hub; download it first "
            "(hf download NAME --local-dir DIR) and give the folder, or use 'tiny'"
        )
        raise VLMLoadError(f"VLM {name!r}: cannot load its {what}: {hint} ({str(error).splitlines()[0]})") from error
    finally:
        logging.enable_progress_bar()


def load_config(name: str):
    """The ``Qwen3VLConfig`` of a name or folder, without its weights. Raises :class:`VLMLoadError`."""
    from transformers import AutoConfig

    config = _load(AutoConfig.from_pretrained, name, "configuration")
    if config.model_type != "qwen3_vl":
        raise VLMLoadError(f"VLM {name!r} is a {config.model_type!r}; wanted a Qwen3-VL model (model_type 'qwen3_vl')")
    return config


def load_tokenizer(name: str):
    """The tokenizer, with the chat template of the folder. Raises :class:`VLMLoadError`."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer.from_pretrained, name, "tokenizer")
    if tokenizer.chat_template is None:
        raise VLMLoadError(f"VLM {name!r}: its tokenizer has no chat template; add chat_template.jinja to the folder")
    return tokenizer


def load_image_statistics(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel that the model's image processor normalises with."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = _load(Qwen2VLImageProcessorPil.from_pretrained, name, "image processor")
    return list(processor.image_mean), list(processor.image_std)


def load_model(name: str, dtype: torch.dtype, random_weights: bool = False) -> nn.Module:
    """``Qwen3VLForConditionalGeneration`` in ``dtype`` with SDPA attention.

    ``random_weights`` builds it from the configuration alone (benchmarks at full size without a download).
    """
    from transformers import Qwen3VLForConditionalGeneration

    if random_weights:
        config = load_config(name)
        return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return _load(
        Qwen3VLForConditionalGeneration.from_pretrained, name, "weights", dtype=dtype, attn_implementation="sdpa"
    )


VLM_MODES = ("frozen", "lora", "full")
