"""Rigid transforms and rotations in torch: 6-D rotations, quaternions, SE(3) inverse."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rotation_from_6d(rows: torch.Tensor) -> torch.Tensor:
    """Rotation matrices from the 6-D form of Zhou et al. (CVPR 2019), by Gram-Schmidt.

    Args:
        rows: (..., 6), the first two *rows* of the matrix, flattened; need not be orthonormal.
    Returns:
        (..., 3, 3)
    """
    first = F.normalize(rows[..., 0:3], dim=-1)
    second = rows[..., 3:6]
    second = F.normalize(second - (first * second).sum(-1, keepdim=True) * first, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=-2)


def rotation_to_6d(rotation: torch.Tensor) -> torch.Tensor:
    """First two rows of (..., 3, 3), flattened to (..., 6)."""
    return rotation[..., :2, :].flatten(-2)


def rotation_from_quaternion(wxyz: torch.Tensor) -> torch.Tensor:
    """Rotation matrices (..., 3, 3) from quaternions (..., 4), scalar first, normalised here."""
    w, x, y, z = F.normalize(wxyz, dim=-1).unbind(-1)
    matrix = torch.stack(
        [
            1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
            2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
            2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
        ],
        dim=-1,
    )  # fmt: skip
    return matrix.unflatten(-1, (3, 3))


def make_transform(rotation: torch.Tensor, translation: torch.Tensor) -> torch.Tensor:
    """(..., 4, 4) from (..., 3, 3) and (..., 3)."""
    top = torch.cat([rotation, translation.unsqueeze(-1)], dim=-1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1.0  # made on the device: a constant from the host would wait for it
    return torch.cat([top, bottom], dim=-2)


def invert_transform(transform: torch.Tensor) -> torch.Tensor:
    """Inverse of rigid transforms (..., 4, 4) in closed form."""
    rotation = transform[..., :3, :3].transpose(-1, -2)
    return make_transform(rotation, -(rotation @ transform[..., :3, 3:]).squeeze(-1))
