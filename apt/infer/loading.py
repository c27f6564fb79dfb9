"""A trained policy from a checkpoint file and the configuration beside it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from apt.checkpoint import CheckpointError, load_checkpoint, read_config
from apt.configs import TrainConfig, TrainedConfig, train_config_from_dict
from apt.model.vla import VLA
from train_utils.ema import apply_shadow, released_average

logger = logging.getLogger(__name__)


def load_policy(
    ckpt_path: str | Path, device: torch.device | str = "cpu", use_ema: bool = False
) -> tuple[VLA, TrainConfig]:
    """The policy in evaluation mode on ``device`` and the configuration it was trained with.

    Raises:
        CheckpointError: unreadable file, no configuration beside it, or no EMA where one is asked for.
        CheckpointMismatch: tensors that do not fit the configuration.
    """
    path, device = Path(ckpt_path), torch.device(device)
    content = load_checkpoint(path)
    config, unknown = train_config_from_dict(read_config(path))
    if not isinstance(config, TrainedConfig):
        logger.warning(
            "%s does not say how its data were sampled, as earlier versions did not: today's class of %s is taken",
            path,
            ", ".join(config.dataset_classes),
        )
    elif changed := config.changed_rules():
        logger.warning("%s goes by the sampling rules that it was trained with (%s)", path, "; ".join(changed))
    if unknown:
        logger.warning("%s: ignored in its configuration, unknown to this version: %s", path, ", ".join(unknown))
    if config.train_stage == 0:
        logger.warning("%s is a VA prior: it wants an instruction and does not follow it", path)
    half = config.fp16 and device.type == "cuda"
    dtype = torch.bfloat16 if half else torch.float32
    model = VLA(config.vla_config(), frozen_dtype=dtype, random_vlm=config.random_vlm)
    model.load(content)
    if use_ema:
        if not content.get("ema"):
            raise CheckpointError(f"{path} holds no EMA; train with --ema_enabled True, or load without use_ema")
        if average := released_average(content):
            weights, vlm_weights = average
            model.load({**content, "weights": weights, "vlm_weights": vlm_weights})
        else:
            apply_shadow(model, content["ema"])
    return model.to(device).eval().requires_grad_(False), config


def merge_adapters(model: nn.Module) -> None:
    """Add peft's adapters into the layers they were injected in and put those in their place: same outputs, no
    extra work per call. A model without adapters is left as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
