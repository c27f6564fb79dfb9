"""Samples of any mix of datasets -> one padded :class:`Batch`, prompts tokenized and left-padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from data_utils.samples.device_augment import stack_draws
from data_utils.types import Batch, ColorDraws, Observation, Sample, TextTargets, TokenizedPrompt

STATE_DIM = 17


class Collator:
    """Callable that batches samples; picklable where ``tokenize`` is.

    Args:
        tokenize: (prompt, number of shown cameras) -> :class:`TokenizedPrompt`; cached by the caller.
        pad_id: token id written on padding.
        num_cameras: Ncam of the batch; samples with fewer get cameras with an empty mask.
        num_arms: Nee of the batch; samples with fewer get arms with ``valid_ee`` False.
        pad_multiple: the prompt length is rounded up to a multiple of this.
    """

    def __init__(
        self,
        tokenize: Callable[[str, int], TokenizedPrompt],
        pad_id: int,
        num_cameras: int,
        num_arms: int,
        pad_multiple: int = 1,
    ) -> None:
        if pad_multiple < 1:
            raise ValueError(f"pad_multiple is {pad_multiple}; it must be at least 1")
        self.tokenize = tokenize
        self.pad_id = pad_id
        self.num_cameras = num_cameras
        self.num_arms = num_arms
        self.pad_multiple = pad_multiple

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Batch the samples; a missing future becomes zeros.

        Raises:
            ValueError: a sample with more cameras or arms than the batch, or of another size; names its source.
        """
        self._check(samples)
        cameras, arms = self.num_cameras, self.num_arms
        mask = _stack([sample.mask for sample in samples], 1, cameras, 0)  # (B, To, Ncam, H, W)
        camera_mask = mask[:, -1].any((-2, -1))  # (B, Ncam)
        shown = camera_mask.sum(-1).tolist()
        prompts = [self.tokenize(sample.prompt, count) for sample, count in zip(samples, shown, strict=True)]
        input_ids, position_ids, attention_mask, targets = pad_prompts(prompts, self.pad_id, self.pad_multiple)
        observation = Observation(
            rgb=torch.from_numpy(_stack([sample.rgb for sample in samples], 1, cameras, 0)),
            mask=torch.from_numpy(mask),
            K=torch.from_numpy(_stack([sample.K for sample in samples], 0, cameras, np.eye(3))),
            world_from_cam=torch.from_numpy(_stack([s.world_from_cam for s in samples], 1, cameras, np.eye(4))),
            world_from_ee=torch.from_numpy(_stack([s.world_from_ee for s in samples], 0, arms, np.eye(4))),
            world_from_ref=torch.from_numpy(_stack([s.world_from_ref for s in samples], 0, arms, np.eye(4))),
            history=torch.from_numpy(_stack([sample.history for sample in samples], 1, arms, REST_STATE)),
            valid_ee=torch.from_numpy(_stack([sample.valid_ee for sample in samples], 0, arms, False)),
            camera_mask=torch.from_numpy(camera_mask),
            image_index=torch.from_numpy(np.flatnonzero(camera_mask)),
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            prompt=[sample.prompt for sample in samples],
        )
        return Batch(
            observation=observation,
            future=torch.from_numpy(_stack(_futures(samples), 1, arms, REST_STATE)),
            gripper_mask=torch.from_numpy(_stack([sample.gripper_mask for sample in samples], 0, arms, False)),
            timestamp=torch.tensor([sample.timestamp for sample in samples], dtype=torch.float64),
            source=[sample.source for sample in samples],
            targets=targets,
            skipped=[skipped for sample in samples for skipped in sample.skipped],
            color=self._color(samples),
        )

    def _color(self, samples: Sequence[Sample]) -> ColorDraws | None:
        deferred = [sample.color for sample in samples if sample.color is not None]
        if deferred and len(deferred) < len(samples):
            raise ValueError("some samples of a batch leave colour changes to the device and others do not")
        return stack_draws(deferred, self.num_cameras) if deferred else None

    def _check(self, samples: Sequence[Sample]) -> None:
        if not samples:
            raise ValueError("an empty list of samples cannot be batched")
        first = samples[0]
        for sample in samples:
            where = sample.source or "a sample"
            if sample.rgb.shape[1] > self.num_cameras or len(sample.valid_ee) > self.num_arms:
                raise ValueError(
                    f"{where} has {sample.rgb.shape[1]} cameras and {len(sample.valid_ee)} arms; "
                    f"the batch holds {self.num_cameras} and {self.num_arms}"
                )
            mine = (len(sample.rgb), *sample.rgb.shape[-2:], len(sample.history))
            wanted = (len(first.rgb), *first.rgb.shape[-2:], len(first.history))
            if mine != wanted:
                raise ValueError(f"{where} has (To, H, W, Th) = {mine}, another sample of the batch {wanted}")


def pad_prompts(
    prompts: Sequence[TokenizedPrompt], pad_id: int, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TextTargets]:
    """Left-padded to one length L, a multiple of ``multiple``.

    Returns:
        Token ids (B, L), positions (3, B, L), attention mask (B, L) bool, and what a language-modelling loss asks for.
    """
    length = -(-max(len(prompt.ids) for prompt in prompts) // multiple) * multiple
    ids = np.full((len(prompts), length), pad_id, np.int64)
    # Padding is masked out; 1 is what Qwen's own position code writes there.
    position_ids = np.ones((3, len(prompts), length), np.int64)
    attention = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        start = length - len(prompt.ids)
        ids[row, start:] = prompt.ids
        position_ids[:, row, start:] = prompt.position_ids
        attention[row, start:] = True
    counts = [prompt.num_targets for prompt in prompts]
    targets = TextTargets(torch.tensor(counts), max(counts))
    return torch.from_numpy(ids), torch.from_numpy(position_ids), torch.from_numpy(attention), targets


REST_STATE = np.append(np.eye(4).reshape(16), 0.0)  # identity pose, closed gripper


def _futures(samples: Sequence[Sample]) -> list[np.ndarray]:
    lengths = {len(sample.future) for sample in samples if sample.future is not None}
    if len(lengths) > 1:
        raise ValueError(f"samples of one batch have {sorted(lengths)} future steps; datasets of a mixture must agree")
    steps = lengths.pop() if lengths else 0
    return [
        sample.future if sample.future is not None else np.zeros((steps, len(sample.valid_ee), STATE_DIM), np.float32)
        for sample in samples
    ]


def _stack(arrays: Sequence[np.ndarray], axis: int, size: int, fill) -> np.ndarray:
    """Stack along a new first axis; ``axis`` of the items is padded at its end to ``size`` with ``fill``."""
    shape = list(arrays[0].shape)
    shape[axis] = size
    out = np.empty((len(arrays), *shape), arrays[0].dtype)
    inside = [slice(None)] * axis
    for row, array in enumerate(arrays):
        out[(row, *inside, slice(array.shape[axis]))] = array
        if array.shape[axis] < size:
            out[(row, *inside, slice(array.shape[axis], None))] = fill
    return out
