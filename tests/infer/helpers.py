"""Policies and frames for tests of inference."""

from __future__ import annotations

import dataclasses

import torch

from apt.infer.frames import frame_from_episode
from apt.infer.policy import Policy
from apt.model.config import VLAConfig
from apt.model.vla import VLA
from apt.presets import CONFIGS
from data_utils.samples.dataset import H5DatasetMapBase


def tiny_policy(compile: str = "none", vlm_mode: str = "frozen", **changes) -> Policy:
    """A tiny policy, on the CPU, whose zero-initialised parts are filled, so that all inputs reach the output."""
    torch.manual_seed(0)
    config = VLAConfig(model="tiny", vlm="tiny", vlm_layer_stride=1, action_step_embedding=True, vlm_mode=vlm_mode)
    model = VLA(dataclasses.replace(config, **changes))
    with torch.no_grad():
        for parameter in model.expert.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    fields = ("arch", "objective", "prediction", "action_scale", "train_stage")
    built = {field: getattr(model.config, field) for field in fields}
    return Policy(model, dataclasses.replace(CONFIGS["debug"], image_size=64, **built), "cpu", compile)


def frame_at(dataset: H5DatasetMapBase, episode: int, frame: int) -> dict:
    """A recorded frame as a robot would hand it over."""
    return frame_from_episode(dataset.episode(episode), frame, dataset.config)
