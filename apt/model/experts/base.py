"""What every action expert takes and gives, whatever its architecture.

Shapes: ``B`` batch, ``L`` VLM tokens, ``C`` VLM width, ``Ncam`` cameras, ``Nee`` arms, ``Th`` history steps, ``Ta``
future steps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from apt.model.action_scale import ACTION_DIM, ROTATION, TRANSLATION
from apt.model.action_transform import STATE_DIM
from apt.model.layers.rotations import make_transform, rotation_from_quaternion
from apt.model.objectives.base import Objective
from data_utils.types import map_tensors


class Modality:
    """What a token is. Plain numbers: torch.compile does not follow a comparison of a tensor with an enum's member."""

    PAD = 0
    VISION = 1
    LANGUAGE = 2
    ACTION = 3


@dataclass(frozen=True)
class VLMReads:
    """What an expert reads of the VLM. A feature index j stands for decoder layer ``j * vlm_layer_stride``; indices
    ascend, and layers behind the last of them are not run."""

    hidden_states: tuple[int, ...] = ()
    """Features whose residual stream, after the layer, is read."""
    keys_values: tuple[int, ...] = ()
    """Features whose layer's own keys and values are read, as its attention uses them."""
    inputs_embeds: bool = False
    """Whether the multimodal input embeddings are read."""

    def __post_init__(self) -> None:
        for name in ("hidden_states", "keys_values"):
            indices = getattr(self, name)
            if any(index < 0 for index in indices) or sorted(set(indices)) != list(indices):
                raise ValueError(f"an expert reads {name} {indices} of the VLM; wanted ascending indices from 0")


@dataclass
class VLMFeatures:
    """What the expert gets from the VLM, per token."""

    inputs_embeds: torch.Tensor | None  # (B, L, C), image embeddings scattered in, if the expert asked for them
    hidden_states: dict[int, torch.Tensor]  # feature index -> (B, L, C), those the expert asked for
    modality: torch.Tensor  # (B, L) int64, Modality; PAD exactly where the token is not valid
    position: torch.Tensor  # (B, L) int64, 1-D position
    camera: torch.Tensor  # (B, L) int64, the camera a vision slot belongs to, -1 for other tokens
    norm_xy: torch.Tensor  # (B, L, 2), camera-plane coordinates of vision slots, 0 elsewhere
    world_from_cam: torch.Tensor  # (B, Ncam, 4, 4)
    camera_mask: torch.Tensor  # (B, Ncam) bool, cameras that count
    keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)
    # feature index -> keys, with the VLM's rotary positions in, and values: (B, L, key-value heads, d) each
    rotary_end: torch.Tensor | None = None  # (B,) int64, the VLM's rotary position behind the last token given here

    @property
    def valid(self) -> torch.Tensor:
        """(B, L) bool"""
        return self.modality != Modality.PAD

    def detached(self) -> "VLMFeatures":
        """The same features, through which no gradient reaches the VLM."""
        return map_tensors(self, torch.Tensor.detach)


@dataclass
class RobotState:
    """Where the arms are and were."""

    world_from_ee: torch.Tensor  # (B, Nee, 4, 4), now
    world_from_ref: torch.Tensor  # (B, Nee, 4, 4), the camera whose axes an arm's action is expressed in
    history: torch.Tensor  # (B, Th, Nee, 17)
    valid_ee: torch.Tensor  # (B, Nee) bool


@dataclass
class TrainingDraws:
    """Every random number of one training pass, so that a pass can be repeated or tested."""

    world_quaternion: torch.Tensor  # (B, 4) wxyz, normalised on use: a uniformly random rotation of the world
    noise: torch.Tensor  # (B * K, Nee, Ta, 10), K draws per sample, a sample's draws side by side
    timestep: torch.Tensor  # (B * K,), diffusion times as the network is told them
    history_noise: torch.Tensor | None = None  # (B, Nee, Th, 9), metres and r6 units
    ee_noise: torch.Tensor | None = None  # (B, Nee, 3), metres

    HISTORY_TRANSLATION_STD = 0.005
    HISTORY_ROTATION_STD = 0.01
    EE_TRANSLATION_STD = 0.003

    @classmethod
    def draw(
        cls,
        robot: RobotState,
        num_future: int,
        objective: Objective,
        pose_noise: bool = False,
        noise_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> "TrainingDraws":
        """Draw for a batch, on its device.

        Args:
            pose_noise: perturb the policy's proprioceptive inputs.
            noise_samples: K, diffusion draws per sample.
        """
        device = robot.history.device
        batch, history, arms, _ = robot.history.shape

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, generator=generator)

        draws = cls(
            world_quaternion=normal(batch, 4),
            noise=normal(batch * noise_samples, arms, num_future, ACTION_DIM),
            timestep=objective.draw_timesteps(batch * noise_samples, device, generator),
        )
        if pose_noise:
            draws.history_noise = normal(batch, arms, history, ACTION_DIM - 1)
            draws.history_noise[..., TRANSLATION] *= cls.HISTORY_TRANSLATION_STD
            draws.history_noise[..., ROTATION] *= cls.HISTORY_ROTATION_STD
            draws.ee_noise = normal(batch, arms, 3) * cls.EE_TRANSLATION_STD
        return draws


def recentring_transform(features: VLMFeatures, quaternion: torch.Tensor | None = None) -> torch.Tensor:
    """``centred_from_world`` (B, 4, 4): origin at the mean position of the cameras that count.

    ``quaternion`` (B, 4) wxyz rotates the new frame (training); None keeps the world's axes.
    """
    weight = features.camera_mask.to(features.world_from_cam.dtype).unsqueeze(-1)  # (B, Ncam, 1)
    centre = (features.world_from_cam[..., :3, 3] * weight).sum(1) / weight.sum(1).clamp(min=1.0)
    if quaternion is None:
        rotation = torch.eye(3, dtype=centre.dtype, device=centre.device).expand(len(centre), 3, 3)
    else:
        rotation = rotation_from_quaternion(quaternion.to(centre.dtype))
    return make_transform(rotation, -(rotation @ centre.unsqueeze(-1)).squeeze(-1))


def transform_states(new_from_old: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Re-express states (B, T, Nee, 17) by ``new_from_old`` (B, 4, 4)."""
    poses = new_from_old[:, None, None] @ states[..., : STATE_DIM - 1].unflatten(-1, (4, 4))
    return torch.cat([poses.flatten(-2), states[..., STATE_DIM - 1 :]], dim=-1)


def recentre(
    features: VLMFeatures, robot: RobotState, centred_from_world: torch.Tensor
) -> tuple[VLMFeatures, RobotState]:
    """Features and robot with every pose re-expressed in the re-centred frame."""
    per_pose = centred_from_world.unsqueeze(1)
    return (
        dataclasses.replace(features, world_from_cam=per_pose @ features.world_from_cam),
        dataclasses.replace(
            robot,
            world_from_ee=per_pose @ robot.world_from_ee,
            world_from_ref=per_pose @ robot.world_from_ref,
            history=transform_states(centred_from_world, robot.history),
        ),
    )
