"""Colour augmentation of whole batches on the device that trains, from the draws of ``augment.py``.

Workers draw, pack the draws (``color_draws.py``) and send unchanged uint8 frames; the device looks colours up, mixes
them and blurs (:func:`recolor`), which costs a CPU a third of its time per sample. The result equals the CPU's to one
level of 255 (rounding in the blur).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from data_utils.samples.augment import MAX_PATCHES
from data_utils.samples.color_draws import no_draws
from data_utils.types import Batch, ColorDraws


def stack_draws(draws: Sequence[ColorDraws], num_cameras: int) -> ColorDraws:
    """Draws of a batch as tensors (B, num_cameras, ...); cameras that a sample lacks show nothing."""
    padded = no_draws(num_cameras)
    stacked = {}
    for field in dataclasses.fields(ColorDraws):
        fill = getattr(padded, field.name)
        values = [getattr(item, field.name) for item in draws]
        stacked[field.name] = torch.from_numpy(np.stack([np.concatenate([v, fill[len(v) :]]) for v in values]))
    return ColorDraws(**stacked)


def recolor(rgb: torch.Tensor, draws: ColorDraws) -> torch.Tensor:
    """Apply a batch's draws on the device its tensors are on.

    Args:
        rgb: (B, To, Ncam, 3, H, W) uint8, letterboxed, colours as stored.
        draws: (B, Ncam, ...).
    Returns:
        (B, To, Ncam, 3, H, W) uint8, black outside the windows.
    """
    B, To, Ncam, _, H, W = rgb.shape
    images = rgb.transpose(1, 2).reshape(B * Ncam, To, 3, H, W)  # all frames of a camera share one draw
    flat = ColorDraws(**{f.name: getattr(draws, f.name).flatten(0, 1) for f in dataclasses.fields(ColorDraws)})
    rows = torch.arange(H, device=rgb.device)
    columns = torch.arange(W, device=rgb.device)
    for number in range(MAX_PATCHES):
        inside = _inside(flat.patches[:, number], rows, columns)  # (N, H, W)
        color = flat.patch_colors[:, number, None, :, None, None]  # (N, 1, 3, 1, 1)
        images = torch.where(inside[:, None, None], color, images)
    index = images.transpose(1, 2).reshape(B * Ncam * 3, -1).long()
    images = flat.lookup.flatten(0, 1).gather(1, index).view(B * Ncam, 3, To, H, W)
    mixed = torch.einsum("nij,njthw->ntihw", flat.mix, images.float()).round_().clamp_(0, 255)
    for axis, (first, size) in ((3, (0, 2)), (4, (1, 3))):
        mixed = _blur(mixed, flat.blur, axis, flat.window[:, first], flat.window[:, size])
    mixed = mixed.round_() * _inside(flat.window, rows, columns)[:, None, None]
    return mixed.to(torch.uint8).view(B, Ncam, To, 3, H, W).transpose(1, 2)


def _inside(window: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(N, H, W) bool: which pixels lie in the windows (N, 4) of top, left, height, width."""
    top, left, height, width = window[:, :, None].unbind(1)  # (N, 1) each
    vertical = (rows >= top) & (rows < top + height)  # (N, H)
    horizontal = (columns >= left) & (columns < left + width)  # (N, W)
    return vertical[:, :, None] & horizontal[:, None, :]


def _blur(images: torch.Tensor, taps: torch.Tensor, axis: int, first: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Filter (N, To, 3, H, W) along ``axis``, mirrored at the windows' borders without repeating the border pixel."""
    N, length = len(images), images.shape[axis]
    positions = torch.arange(length, device=images.device)
    out = torch.zeros_like(images)
    shape = [N, 1, 1, 1, 1]
    shape[axis] = length
    for tap in range(taps.shape[1]):
        offset = positions + tap - taps.shape[1] // 2 - first[:, None]  # (N, length), from the window's edge
        period = (2 * size[:, None] - 2).clamp(min=1)
        folded = offset.remainder(period)
        source = first[:, None] + torch.minimum(folded, period - folded)
        index = source.clamp(0, length - 1).view(shape).expand(images.shape)
        out += taps[:, tap].view(N, 1, 1, 1, 1) * images.gather(axis, index)
    return out


def recolored(batch: Batch) -> Batch:
    """With the changes of colour made that were left to the device; itself where none were."""
    if batch.color is None:
        return batch
    observation = dataclasses.replace(batch.observation, rgb=recolor(batch.observation.rgb, batch.color))
    return dataclasses.replace(batch, observation=observation, color=None)
