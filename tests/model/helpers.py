"""Policies, observations and batches for model tests, these through the project's own collator."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import nn

from apt.model.action_scale import ACTION_DIM
from apt.model.action_transform import STATE_DIM
from apt.model.config import VLAConfig
from apt.model.encoders.vision_tower import patchify
from apt.model.vla import VLA
from apt.model.vlm import VLM
from data_utils.batches.collate import Collator
from data_utils.types import Batch, Observation, Sample
from tests.synthetic import pose

SMALL = VLAConfig(model="tiny", vlm="tiny", vlm_layer_stride=1, num_future=8)
K = np.array([[60.0, 0, 32], [0, 60, 32], [0, 0, 1]], np.float32)


def make_sample(
    prompt: str, seed: int, hw: tuple[int, int] = (64, 64), cameras: int = 2, arms: int = 1, num_future: int = 8
) -> Sample:
    rng = np.random.default_rng(seed)

    def poses(*shape: int) -> np.ndarray:
        out = np.tile(pose([0, 0, 0]), (*shape, 1, 1)).astype(np.float32)
        out[..., :3, 3] = rng.normal(0, 0.2, (*shape, 3))
        return out

    def states(steps: int) -> np.ndarray:
        out = np.empty((steps, arms, STATE_DIM), np.float32)
        out[..., :16] = poses(steps, arms).reshape(steps, arms, 16)
        out[..., 16] = rng.random((steps, arms))
        return out

    history = states(1)
    return Sample(
        rgb=rng.integers(0, 256, (1, cameras, 3, *hw), dtype=np.uint8),
        mask=np.ones((1, cameras, *hw), bool),
        K=np.tile(K, (cameras, 1, 1)),
        world_from_cam=poses(1, cameras),
        prompt=prompt,
        world_from_ee=history[-1, :, :16].reshape(arms, 4, 4).copy(),
        world_from_ref=poses(arms),
        history=history,
        valid_ee=np.ones(arms, bool),
        gripper_mask=np.ones(arms, bool),
        timestamp=0.0,
        future=states(num_future),
        source=f"sample {seed}",
    )


def make_batch(
    vlm: VLM,
    prompts: list[str],
    hw: tuple[int, int] = (64, 64),
    cameras: int = 2,
    arms: int = 1,
    num_future: int = 8,
    hidden: list[tuple[int, int]] = (),
    seed: int = 0,
) -> Batch:
    """A random batch; ``hidden`` lists (sample, camera) whose mask is empty."""
    samples = [make_sample(p, seed + i, hw, cameras, arms, num_future) for i, p in enumerate(prompts)]
    for sample, camera in hidden:
        samples[sample].mask[:, camera] = False
    tokenize = vlm.prompt_tokenizer(hw)
    return Collator(tokenize, tokenize.pad_id, cameras, arms)(samples)


def make_observation(vlm: VLM, prompts: list[str], **options) -> Observation:
    return make_batch(vlm, prompts, **options).observation


def build(stage: int, seed: int = 0, **changes) -> VLA:
    """A policy whose zero-initialised parts are filled, so that everything could reach the output."""
    torch.manual_seed(seed)
    model = VLA(dataclasses.replace(SMALL, train_stage=stage, **changes)).eval()
    with torch.no_grad():
        for parameter in model.expert.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def fixed_noise(batch: Batch, samples: int = 1) -> torch.Tensor:
    """Noise (B * samples, Nee, Ta, 10) to denoise from, always the same."""
    count, arms = batch.observation.valid_ee.shape
    shape = count * samples, arms, batch.future.shape[1], ACTION_DIM
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def run_hugging_face(model: nn.Module, observation: Observation, **options):
    """What Hugging Face's own ``Qwen3VLForConditionalGeneration`` (the tiny one) makes of an observation."""
    images = observation.rgb[:, -1].flatten(0, 1)[observation.image_index]
    return run_hugging_face_on(model, images, observation.input_ids, observation.attention_mask, **options)


@torch.no_grad()
def run_hugging_face_on(
    model: nn.Module, images: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options
):
    """The same of images (Nimg, 3, H, W) uint8 and tokens (B, L)."""
    vision, statistics = model.config.vision_config, torch.full((3,), 0.5)
    patches = patchify(images, vision.patch_size, vision.spatial_merge_size, statistics, statistics)
    rows, columns = images.shape[-2] // vision.patch_size, images.shape[-1] // vision.patch_size
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask.long(),
        pixel_values=as_two_frames(patches),
        image_grid_thw=torch.tensor([[1, rows, columns]] * len(images)),
        mm_token_type_ids=(input_ids == model.config.image_token_id).int(),
        **options,
    )


def as_two_frames(patches: torch.Tensor) -> torch.Tensor:
    """Patches of a still image as Hugging Face lays them out: every channel's pixels for two frames."""
    return patches.unflatten(1, (3, 1, -1)).expand(-1, -1, 2, -1).flatten(1)
