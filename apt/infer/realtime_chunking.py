"""Real-time chunking: a new chunk begins as the one that is being executed goes on.

While a policy thinks, the robot follows its last chunk. By the time the answer arrives, its first steps lie in the
past, and where several motions are possible it may have chosen another one: the arm jerks. After "Real-Time Execution
of Action Chunking Flow Policies" (Black et al., 2025) the new chunk is therefore inpainted: steps that will have been
executed are frozen to the old chunk's, those after it are drawn towards them with a weight that falls to 0 at the old
chunk's end.

The paper guides flow matching by a vector-Jacobian product. Here the sampler predicts the clean action at every step,
so that is blended with the old chunk: a weight of 1 comes out exactly, and no gradients are needed.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import numpy as np
import torch

from apt.model.action_transform import STATE_DIM, state_to_action
from apt.model.objectives.base import Guide
from data_utils.geometry.resample import interpolate_poses, interpolate_values
from data_utils.types import Observation


@dataclass(frozen=True)
class RealTimeChunking:
    """How the last chunk constrains the next one.

    ``delay`` counts in the frames' clock (seconds on robots): from a frame's timestamp to the moment at which the chunk
    planned from it is first followed, that is transport and inference, rounded up. Steps up to there are frozen.
    """

    delay: float

    def __post_init__(self) -> None:
        number = isinstance(self.delay, numbers.Real) and not isinstance(self.delay, bool)
        if not (number and math.isfinite(self.delay) and self.delay >= 0):
            raise ValueError(
                f"the real-time chunking delay is {self.delay!r}; wanted a number of the frames' clock (seconds on "
                "robots, control steps in simulators), 0 or more and shorter than a chunk"
            )

    def check_fits(self, chunk_length: float, unit: str) -> None:
        """Raise ``ValueError`` where nothing of a chunk that is ``chunk_length`` of the frames' clock long is left to
        plan after the delay; ``unit``: what the clock counts."""
        if self.delay >= chunk_length:
            raise ValueError(
                f"the real-time chunking delay is {self.delay:g} {unit}, and a chunk is {chunk_length:g} {unit} long; "
                f"wanted a shorter delay, in {unit}: with this one, nothing of a chunk would be planned anew"
            )

    def weights(self, times: np.ndarray, now: float, until: float) -> np.ndarray:
        """(Ta,) in [0, 1] of steps at ``times`` (Ta,), with the old chunk ending at ``until``."""
        frozen = now + self.delay
        share = np.clip((until - times) / max(until - frozen, 1e-9), 0.0, 1.0)
        soft = share * np.expm1(share) / math.expm1(1.0)
        return np.where(times > until, 0.0, np.where(times <= frozen, 1.0, soft))


@dataclass(frozen=True)
class Chunk:
    """A chunk as the policy predicted it."""

    times: np.ndarray  # (Ta,)
    states: np.ndarray  # (Ta, Nee, 17), the policy's own end-effector poses in the world

    def at(self, times: np.ndarray) -> np.ndarray:
        """(Q, Nee, 17) interpolated at times (Q,), clamped to the chunk's ends."""
        poses = self.states[..., : STATE_DIM - 1].reshape(*self.states.shape[:2], 4, 4)
        out = np.empty((len(times), *self.states.shape[1:]))
        out[..., : STATE_DIM - 1] = interpolate_poses(self.times, poses, times).reshape(*out.shape[:2], STATE_DIM - 1)
        out[..., STATE_DIM - 1] = interpolate_values(self.times, self.states[..., STATE_DIM - 1], times)
        return out


def guide_from_chunk(
    chunking: RealTimeChunking, executed: Chunk, times: np.ndarray, now: float, observation: Observation
) -> Guide | None:
    """What draws the chunk at ``times`` (Ta,) towards ``executed``; None where that one has ended.

    ``observation``'s first item tells the current end-effector pose and the reference cameras, in which the executed
    chunk is expressed anew.
    """
    weight = chunking.weights(times, now, executed.times[-1])
    if not weight.any():
        return None
    states = torch.from_numpy(executed.at(times)).float()  # (Ta, Nee, 17)
    action = state_to_action(states, observation.world_from_ee[0].cpu(), observation.world_from_ref[0].cpu())
    return Guide(action.transpose(0, 1).unsqueeze(0), torch.from_numpy(weight).float().view(1, 1, -1, 1))
