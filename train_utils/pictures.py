"""What a person would rather look at than read: trajectories on images, gates as a heat map."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from data_utils.types import Batch
from infer_utils.draw_traj import PREDICTED, RECORDED, draw_on_cameras


def trajectory_picture(batch: Batch, predicted: torch.Tensor, samples: int = 4) -> np.ndarray:
    """Predicted (red) and recorded (green) futures of the first samples on every camera, (H, W, 3) uint8.

    Args:
        batch: on any device.
        predicted: (B, Ta, Nee, 17).
    """
    observation = batch.observation
    rows = []
    for index in range(min(samples, observation.batch_size)):
        arms, shown = observation.valid_ee[index], observation.camera_mask[index].cpu().numpy()
        futures = [(batch.future[index][:, arms], RECORDED), (predicted[index][:, arms], PREDICTED)]
        rows.append(
            draw_on_cameras(
                observation.rgb[index, -1].cpu().numpy(),
                observation.K[index].cpu().numpy(),
                observation.world_from_cam[index, -1].cpu().numpy(),
                [(states.float().cpu().numpy(), color) for states, color in futures],
                shown=shown,
            )
        )
    return np.concatenate(rows, axis=0)


def gate_picture(gates: torch.Tensor) -> np.ndarray:
    """How much of its own stream each layer keeps, ``sigmoid(gates)`` (N, h), as a heat map.

    Layers down, channels across. Blue keeps 0 (all VLM), green 0.5 (as initialised), red 1 (all expert).
    """
    keep = torch.sigmoid(gates.detach().float()).cpu().numpy()
    heat = cv2.applyColorMap(np.round(keep * 255).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    return np.ascontiguousarray(np.repeat(np.repeat(heat, 16, axis=0), max(1, 768 // keep.shape[1]), axis=1))
