"""What a query of the planner gives: the trajectory, and where its time went."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of one query's parts, in order; what is left of ``total`` is ensembling and drawing."""

    wait: float  # for other sessions' queries
    preprocess: float  # frames to the policy's observation, and its way to the device
    vlm: float
    prefix: float  # of the action expert: all that precedes denoising
    denoise: float  # the loop, and actions to states
    total: float

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Plan:
    """Trajectories of one query; S samples, Ta steps, Nee arms."""

    poses: np.ndarray  # (S, Ta, Nee, 4, 4), world_from_ee
    grippers: np.ndarray  # (S, Ta, Nee), openness in [0, 1]
    times: np.ndarray  # (Ta,), in the frames' clock
    image: np.ndarray | bytes | None  # the drawing: (H, W, 3) uint8 RGB or JPEG bytes
    timing: Timing
