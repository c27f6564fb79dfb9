"""Where a run starts: from fresh weights, a checkpoint to adapt, or its own last one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from apt.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, read_config
from apt.configs import TrainConfig, TrainedConfig, changed_rules, train_config_from_dict
from apt.model.encoders.hub import load_config
from apt.model.pretrained import OTHER_VLM, CheckpointMismatch
from apt.model.vla import VLA
from apt.training.inheritance import differing_meaning, other_structure
from train_utils.errors import ConfigError
from train_utils.places import LATEST

_TIMES = ("sample_dt", "sample_state_gaps", "num_future", "num_history")


def read_start(config: TrainConfig, say: Callable[[str], None]) -> dict | None:
    """The checkpoint to start from, read before anything is built; None for fresh weights.

    Raises:
        CheckpointError: it is not there or cannot be read.
    """
    if config.resume:
        return load_checkpoint(config.run_dir / LATEST)
    if config.pretrained_ckpt is None:
        return None
    path = find_checkpoint(config.pretrained_ckpt, config.ckpt_dir)
    content = load_checkpoint(path)
    with contextlib.suppress(CheckpointError):  # a file without its configuration is fine to start from
        if others := other_structure(read_config(path), config):
            before, now = (", ".join(f"{field} {pair[which]}" for field, pair in others.items()) for which in (0, 1))
            flags = " ".join(f"--{field} {value}" for field, (value, _) in others.items())
            raise ConfigError(f"{path} is of a policy with {before}, this run's has {now}; give {flags}")
        for field, (before, now) in differing_meaning(read_config(path), config).items():
            say(f"warning: {path} was trained with {field} {before}, this run uses {now}; --{field} {before} fits it")
        for line in _other_sampling(read_config(path), config):
            say(f"warning: {path} was trained with {line}")
    return content


def _other_sampling(saved: dict, config: TrainConfig) -> list[str]:
    """What this run samples otherwise than the one that it starts from: of the same datasets anything, else the times
    of the first of each. Raises :class:`ConfigError`."""
    trained, _ = train_config_from_dict(saved)
    if not isinstance(trained, TrainedConfig):
        return []
    now = dict(zip(config.dataset_classes, config.data_configs(), strict=True))
    common = [name for name in now if name in trained.data]
    pairs = [(name, trained.data[name], now[name], None) for name in common]
    if not common:
        first, mine = next(iter(trained.data)), config.dataset_classes[0]
        pairs = [(f"{first} instead of {mine}", trained.data[first], now[mine], _TIMES)]
    return [
        f"{field} {before} ({title}), this run has {after}"
        for title, old, new, fields in pairs
        for field, (before, after) in changed_rules(old, new).items()
        if fields is None or field in fields
    ]


def _check_image_sizes(config: TrainConfig) -> None:
    vision = load_config(config.vlm).vision_config
    side = vision.patch_size * vision.spatial_merge_size
    for name, data in zip(config.dataset_classes, config.data_configs(), strict=True):
        if any(pixels % side for pixels in data.image_hw):
            height, width = data.image_hw
            fits = max(side, side * round(max(height, width) / side))
            raise ConfigError(
                f"images of {name} are {height} x {width}, and VLM {config.vlm} reads squares of {side} pixels; "
                f"give --image_size {fits}, or another multiple of {side}"
            )


def build_model(config: TrainConfig, on_gpu: bool) -> VLA:
    """The policy with fresh weights, alike on every rank, on the CPU.

    Args:
        on_gpu: where it will train; decides in what precision a frozen VLM is kept.
    Raises:
        ConfigError: images that the VLM cannot cut into its tokens.
    """
    _check_image_sizes(config)
    torch.manual_seed(config.seed)
    return VLA(
        config.vla_config(),
        frozen_dtype=torch.bfloat16 if config.fp16 and on_gpu else torch.float32,
        trained_dtype=torch.bfloat16 if config.vlm_param_dtype == "bf16" else torch.float32,
        random_vlm=config.random_vlm,
    )


def load_start(model: VLA, start: dict, config: TrainConfig, say: Callable[[str], None]) -> None:
    """Put the checkpoint's weights into the model.

    Raises:
        CheckpointMismatch: they do not fit.
    """
    if config.resume:
        model.start_from(start, any_vlm=False)  # its VLM may go on in another mode
        return
    try:
        report = model.start_from(start, config.load_from_va)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{config.pretrained_ckpt} does not fit: {error}") from error
    if report.other_vlm:
        say(f"warning: {config.pretrained_ckpt}: {OTHER_VLM} until it has learned them anew")
    say(
        f"start: {config.pretrained_ckpt}: {len(report.copied)} tensors copied, {len(report.fresh)} fresh, "
        f"{len(report.dropped)} dropped"
    )
