"""SE(3) end-effector states <-> the 10 numbers per step that the network works on (paper's action space).

A state is 17 numbers: row-major ``world_from_state`` (16) and gripper openness in [0, 1]. An action is ``t3 r6 g1``:
the motion relative to the current end-effector pose, expressed along the axes of a reference camera, and openness in
[-1, 1]. All functions take any leading batch dimensions, which broadcast.
"""

from __future__ import annotations

import torch

from apt.model.action_scale import GRIPPER, ROTATION, TRANSLATION
from apt.model.layers.rotations import invert_transform, make_transform, rotation_from_6d, rotation_to_6d

STATE_DIM = 17


def state_to_action(state: torch.Tensor, world_from_ee: torch.Tensor, world_from_ref: torch.Tensor) -> torch.Tensor:
    """Encode states as actions.

    Args:
        state: (..., 17).
        world_from_ee: (..., 4, 4), the current end-effector pose.
        world_from_ref: (..., 4, 4), the reference camera's pose.
    Returns:
        (..., 10)
    """
    world_from_state = state[..., :16].unflatten(-1, (4, 4))
    ee_from_state = invert_transform(world_from_ee) @ world_from_state
    ref_from_ee = (invert_transform(world_from_ref) @ world_from_ee)[..., :3, :3]
    translation = (ref_from_ee @ ee_from_state[..., :3, 3:]).squeeze(-1)
    rotation = ref_from_ee @ ee_from_state[..., :3, :3] @ ref_from_ee.transpose(-1, -2)
    return torch.cat([translation, rotation_to_6d(rotation), 2 * state[..., 16:] - 1], dim=-1)


def state_errors(predicted: torch.Tensor, recorded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How far states (..., 17) are apart: positions in metres, rotations in degrees, and whether one has the gripper
    open and the other not; (...) each."""
    poses = [states[..., :16].unflatten(-1, (4, 4)) for states in (predicted, recorded)]
    position = (poses[0][..., :3, 3] - poses[1][..., :3, 3]).norm(dim=-1)
    trace = (poses[0][..., :3, :3] * poses[1][..., :3, :3]).sum((-2, -1))  # of the relative rotation
    rotation = ((trace - 1) / 2).clamp(-1, 1).arccos().rad2deg()
    return position, rotation, (predicted[..., 16] > 0.5) != (recorded[..., 16] > 0.5)


def action_to_state(action: torch.Tensor, world_from_ee: torch.Tensor, world_from_ref: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`state_to_action`: (..., 10) to (..., 17). r6 need not be orthonormal."""
    ref_from_ee = (invert_transform(world_from_ref) @ world_from_ee)[..., :3, :3]
    ee_from_ref = ref_from_ee.transpose(-1, -2)
    translation = (ee_from_ref @ action[..., TRANSLATION].unsqueeze(-1)).squeeze(-1)
    rotation = ee_from_ref @ rotation_from_6d(action[..., ROTATION]) @ ref_from_ee
    world_from_state = world_from_ee @ make_transform(rotation, translation)
    return torch.cat([world_from_state.flatten(-2), action[..., GRIPPER] / 2 + 0.5], dim=-1)
