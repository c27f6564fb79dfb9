"""Qwen3-VL's vision tower on a batch of equally sized images: uint8 in, one batched attention per layer.

Hugging Face's forward takes images of any sizes, one at a time in Python. Every camera of a policy has one size, so
positions are computed once per size and all images go through together; a test holds the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import AttentionInterface

ATTENTION_NAME = "apt_equal_images"


def equal_images_attention(module, query, key, value, attention_mask=None, scaling=None, tokens_per_image=None, **_):
    """Attention within each image. q, k, v (1, heads, images * tokens_per_image, d), as Hugging Face lays them out."""
    heads, length = query.shape[1:3]
    tokens = length if tokens_per_image is None else tokens_per_image

    def per_image(x: torch.Tensor) -> torch.Tensor:
        return x[0].unflatten(1, (-1, tokens)).transpose(0, 1)  # (images, heads, tokens, d)

    out = F.scaled_dot_product_attention(per_image(query), per_image(key), per_image(value), scale=scaling)
    return out.transpose(1, 2).reshape(1, length, heads, -1), None


def register_attention() -> None:
    """Make the attention above known to transformers under ``ATTENTION_NAME``."""
    AttentionInterface.register(ATTENTION_NAME, equal_images_attention)


def patchify(images: torch.Tensor, patch: int, merge: int, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Normalised patches in Hugging Face's order: (N, 3, H, W) uint8 to (N * H/patch * W/patch, 3 * patch^2).

    H and W must be multiples of ``patch * merge``. Hugging Face's rows hold every channel's pixels once per frame of a
    temporal patch; a still image has one frame.
    """
    count, channels, height, width = images.shape
    block = patch * merge
    x = images.view(count, channels, height // block, merge, patch, width // block, merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, channels, patch * patch)  # still bytes: the copy is cheap
    scale, shift = 1 / (255 * std), mean / std
    return x.float().mul_(scale.view(-1, 1)).sub_(shift.view(-1, 1)).flatten(1)


@dataclass(frozen=True)
class _Grid:
    """What depends on the image's size alone, on the device."""

    taps: torch.Tensor  # (4, tokens) indices into the learned position table
    tap_weights: torch.Tensor  # (4, tokens, 1)
    cos: torch.Tensor  # (tokens, head_dim)
    sin: torch.Tensor  # (tokens, head_dim)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # cached tensors may be met by a backward pass later
def _grid(
    rows: int, columns: int, merge: int, table_side: int, head_dim: int, theta: float, device: torch.device
) -> _Grid:
    """Positions of ``rows x columns`` patches in the tower's order: merge blocks row-major, patches inside likewise."""
    index = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
    index = index.permute(0, 2, 1, 3).reshape(-1)
    coordinates = torch.stack([index // columns, index % columns])  # (2, tokens)

    # The table is resampled bilinearly with its corners on the image's corner patches.
    at = [torch.linspace(0, table_side - 1, count)[c] for count, c in zip((rows, columns), coordinates, strict=True)]
    taps = []
    for position in at:
        low = position.long()
        share = position - low
        taps.append(((low, 1 - share), ((low + 1).clamp(max=table_side - 1), share)))
    pairs = [(row, column) for row in taps[0] for column in taps[1]]

    # Axial rotary embedding: the row's frequencies, then the column's, twice over.
    half = head_dim // 2
    frequency = theta ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
    angles = (coordinates.unsqueeze(-1) * frequency).transpose(0, 1).flatten(1)
    angles = torch.cat([angles, angles], dim=-1)
    return _Grid(
        taps=torch.stack([row[0] * table_side + column[0] for row, column in pairs]).to(device),
        tap_weights=torch.stack([row[1] * column[1] for row, column in pairs]).unsqueeze(-1).to(device),
        cos=angles.cos().to(device),
        sin=angles.sin().to(device),
    )


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


@torch.compiler.assume_constant_result  # cached above: a compiled graph holds the tensors, not their making
def _constants(
    rows: int, columns: int, merge: int, table_side: int, head_dim: int, theta: float,
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """:class:`_Grid`'s tensors, mean and standard deviation."""
    grid = _grid(rows, columns, merge, table_side, head_dim, theta, device)
    return (grid.taps, grid.tap_weights, grid.cos, grid.sin, *_statistics(mean, std, device))


class VisionTower:
    """Runs the modules of a Hugging Face Qwen3-VL vision model; owns no parameters.

    Args:
        visual: ``Qwen3VLForConditionalGeneration.model.visual``; its attention is switched to the batched one.
        mean, std: per-channel normalisation of images in [0, 1], from the model's image processor.
    """

    def __init__(self, visual: nn.Module, mean: list[float], std: list[float]) -> None:
        register_attention()
        visual.config._attn_implementation = ATTENTION_NAME
        self._visual = visual
        self._mean, self._std = tuple(mean), tuple(std)

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Embeddings of images (N, 3, H, W) uint8.

        Returns:
            (N, Lv, C) image embeddings and one such tensor per DeepStack level.
        """
        visual, config, device = self._visual, self._visual.config, images.device
        merge = config.spatial_merge_size
        rows, columns = images.shape[2] // config.patch_size, images.shape[3] // config.patch_size
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
        table_side = int(config.num_position_embeddings**0.5)
        head_dim = config.hidden_size // config.num_heads
        taps, tap_weights, cos, sin, mean, std = _constants(
            rows, columns, merge, table_side, head_dim, theta, self._mean, self._std, device
        )
        patches = patchify(images, config.patch_size, merge, mean, std)

        count, tokens = len(images), rows * columns
        x = self._embed_patches(patches)  # (N * tokens, width)
        table = visual.pos_embed(taps)  # (4, tokens, width)
        x = x + (table * tap_weights.to(table.dtype)).sum(0).to(x.dtype).repeat(count, 1)
        rotary = cos.repeat(count, 1), sin.repeat(count, 1)
        bounds = torch.tensor([0, count * tokens], dtype=torch.int32)  # one chunk; the attention splits by image
        deepstack = []
        for index, block in enumerate(visual.blocks):
            x = block(x, cu_seqlens=bounds, position_embeddings=rotary, tokens_per_image=tokens)
            if index in config.deepstack_visual_indexes:
                level = list(config.deepstack_visual_indexes).index(index)
                deepstack.append(visual.deepstack_merger_list[level](x).unflatten(0, (count, -1)))
        return visual.merger(x).unflatten(0, (count, -1)), deepstack

    def _embed_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """The tower's 3-D convolution on a still image, as one matrix product.

        Every frame of a temporal patch is the same, so the kernel's frames can be added up first: half the work.
        """
        projection = self._visual.patch_embed.proj
        weight = projection.weight.sum(2).flatten(1)  # (width, 3 * patch^2)
        return F.linear(patches.to(weight.dtype), weight, projection.bias)
