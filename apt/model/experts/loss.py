"""The training loss of an action expert: how the errors of an action's ten numbers are weighted and averaged."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt.model.action_transform import GRIPPER, ROTATION, TRANSLATION


@dataclass
class ExpertLoss:
    """Mean errors of what the network predicted: ``total = 30 translation + 10 rotation + 10 gripper`` (scalars,
    attached)."""

    total: torch.Tensor
    translation: torch.Tensor
    rotation: torch.Tensor
    gripper: torch.Tensor
    finite: torch.Tensor
    """(B * K,) bool, which of the samples and their noise draws gave a finite error."""
    lm: torch.Tensor | None = None
    """Where the VLM trains on text too: its cross-entropy per token, which ``total`` then holds, weighted."""
    lm_pairs: torch.Tensor | None = None
    """The same of the answers of image-text pairs alone."""

    def metrics(self) -> dict[str, torch.Tensor]:
        names = ("total", "translation", "rotation", "gripper", "lm", "lm_pairs")
        return {name: value.detach() for name in names if (value := getattr(self, name)) is not None}


def action_loss(error: torch.Tensor, valid_ee: torch.Tensor, gripper_mask: torch.Tensor | None = None) -> ExpertLoss:
    """Weighted mean error, each part a mean pooled over all valid arms of the batch.

    Args:
        error: (B, Nee, Ta, 10), of each number, see :meth:`apt.model.objectives.base.Objective.error`.
        valid_ee: (B, Nee) bool.
        gripper_mask: (B, Nee) bool, arms whose gripper counts; None: all valid ones.
    """

    def pooled(part: slice, arms: torch.Tensor) -> torch.Tensor:
        per_arm = error[..., part].mean(dim=(-2, -1))  # (B, Nee)
        weight = arms.to(per_arm.dtype)
        return (per_arm * weight).sum() / weight.sum().clamp(min=1.0)

    gripper_arms = valid_ee if gripper_mask is None else valid_ee & gripper_mask
    translation, rotation = pooled(TRANSLATION, valid_ee), pooled(ROTATION, valid_ee)
    gripper = pooled(GRIPPER, gripper_arms)
    total = 30.0 * translation + 10.0 * rotation + 10.0 * gripper
    return ExpertLoss(total, translation, rotation, gripper, error.detach().isfinite().flatten(1).all(1))
