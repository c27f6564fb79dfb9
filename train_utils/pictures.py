"""What a person would rather look at than read: trajectories on images, gates as a heat map."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from data_utils.types import Batch
from infer_utils.draw_traj import PREDICTED, RECORDED, draw_states


def trajectory_picture(batch: Batch, predicted: torch.Tensor, samples: int = 4) -> np.ndarray:
    """Predicted (red) and recorded (green) futures of the first samples on every camera, (H, W, 3) uint8.

    Args:
        batch: on any device.
        predicted: (B, Ta, Nee, 17).
    """
    observation = batch.observation
    rows = []
    for index in range(min(samples, observation.batch_size)):
        arms = observation.valid_ee[index].cpu().numpy()
        futures = [(batch.future[index], RECORDED), (predicted[index], PREDICTED)]
        tiles = []
        for camera in range(observation.K.shape[1]):
            tile = observation.rgb[index, -1, camera].permute(1, 2, 0).cpu().numpy()
            if observation.camera_mask[index, camera]:
                K = observation.K[index, camera].cpu().numpy()
                world_from_cam = observation.world_from_cam[index, -1, camera].cpu().numpy()
                for states, color in futures:
                    tile = draw_states(tile, K, world_from_cam, states.float().cpu().numpy()[:, arms], color)
            tiles.append(tile)
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows, axis=0)


def gate_picture(gates: torch.Tensor) -> np.ndarray:
    """How much of its own stream each layer keeps, ``sigmoid(gates)`` (N, h), as a heat map.

    Layers down, channels across. Blue keeps 0 (all VLM), green 0.5 (as initialised), red 1 (all expert).
    """
    keep = torch.sigmoid(gates.detach().float()).cpu().numpy()
    heat = cv2.applyColorMap(np.round(keep * 255).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
    return np.ascontiguousarray(np.repeat(np.repeat(heat, 16, axis=0), max(1, 768 // keep.shape[1]), axis=1))
