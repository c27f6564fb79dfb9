"""Observations and batches for model tests, through the project's own collator."""

from __future__ import annotations

import numpy as np

from apt.action_transform import STATE_DIM
from apt.vlm import VLM
from data_utils.collate import Collator
from data_utils.types import Batch, Observation, Sample
from tests.synthetic import pose

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
