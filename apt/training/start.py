"""Where a run starts: from fresh weights, a checkpoint to adapt, or its own last one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from apt.checkpoint import LATEST, CheckpointError, find_checkpoint, load_checkpoint, read_config
from apt.configs import TrainConfig
from apt.model.pretrained import CheckpointMismatch, Origin
from apt.model.vla import VLA
from apt.training.run_dir import differing_meaning


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
        for field, (before, now) in differing_meaning(read_config(path), config).items():
            say(f"warning: {path} was trained with {field} {before}, this run uses {now}; --{field} {before} fits it")
    return content


def build_model(config: TrainConfig, on_gpu: bool) -> VLA:
    """The policy with fresh weights, alike on every rank, on the CPU.

    Args:
        on_gpu: where it will train; decides in what precision a frozen VLM is kept.
    """
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
        model.load_weights(start["weights"], start.get("vlm_weights"), Origin.of(start))
        return
    try:
        report = model.load_from_pretrain(
            start["weights"], start.get("vlm_weights"), config.load_from_va, origin=Origin.of(start)
        )
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{config.pretrained_ckpt} does not fit: {error}") from error
    say(
        f"start: {config.pretrained_ckpt}: {len(report.copied)} tensors copied, {len(report.fresh)} fresh, "
        f"{len(report.dropped)} dropped"
    )
