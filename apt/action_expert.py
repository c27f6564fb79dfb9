"""The APT action expert: token streams, masks, layer-wise gated fusion (paper section III).

VLM tokens never see action tokens, so a pass has two halves. ``encode_context`` runs the VL stream once and keeps each
block's keys and values; ``denoise`` runs the action tokens against them. Training calls each once, sampling calls
``denoise`` once per diffusion step.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from apt.action_transform import ACTION_DIM, TRANSLATION, action_to_state, state_to_action
from apt.diffusion import Diffusion
from apt.experts.base import (
    ExpertLoss,
    Modality,
    RobotState,
    TrainingDraws,
    VLMFeatures,
    noise_loss,
    recentre,
    recentring_transform,
    transform_states,
)
from apt.layers.attention import SelfAttention
from apt.layers.mlp import MLP, GatedMLP
from apt.layers.norms import ModulatedRMSNorm, RMSNorm
from apt.layers.positions import PoseEncoding, RotaryEncoding, sinusoidal_embedding
from apt.layers.rotations import invert_transform
from apt.policy_config import ExpertConfig

MAX_ARMS = 4
Encoding = RotaryEncoding | PoseEncoding


class ExpertBlock(nn.Module):
    """Pre-norm self-attention and gated MLP, shared by both streams, each with norms of its own."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.norm1_vl, self.norm2_vl = RMSNorm(width), RMSNorm(width)
        self.norm1_action, self.norm2_action = ModulatedRMSNorm(width), ModulatedRMSNorm(width)
        self.attn = SelfAttention(width, heads, backend)
        self.mlp = GatedMLP(width)

    def encode_context(
        self, x: torch.Tensor, encoding: Encoding, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """VL tokens (B, L, h) after the block, and their keys and values (B, L, heads, d) for action tokens."""
        q, k, v = self.attn.qkv(self.norm1_vl(x), encoding)
        x = x + self.attn.attend(q, k, v, mask, encoding)
        return x + self.mlp(self.norm2_vl(x)), k, v

    def context_keys_values(self, x: torch.Tensor, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values alone, for the last block, whose VL output nobody reads."""
        return self.attn.kv(self.norm1_vl(x), encoding)

    def modulation(self, time: torch.Tensor) -> torch.Tensor:
        """Both norms' modulations (B, 4h) of the time embedding (B, h)."""
        return torch.cat([self.norm1_action.modulation(time), self.norm2_action.modulation(time)], dim=-1)

    def denoise(
        self,
        x: torch.Tensor,
        context: tuple[torch.Tensor, torch.Tensor],
        modulation: torch.Tensor,
        encoding: Encoding,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Action tokens (B, A, h) after the block, given the context's keys and values; ``mask`` (B, A, L + A)."""
        first, second = modulation.chunk(2, dim=-1)
        q, k, v = self.attn.qkv(self.norm1_action(x, first), encoding)
        k, v = torch.cat([context[0], k], dim=1), torch.cat([context[1], v], dim=1)
        x = x + self.attn.attend(q, k, v, mask, encoding)
        return x + self.mlp(self.norm2_action(x, second))


@dataclass
class Context:
    """All that denoising needs and that depends neither on the noisy action nor on the diffusion time."""

    keys_values: list[tuple[torch.Tensor, torch.Tensor]]  # per block, (B, L, heads, d) each
    masks: list[torch.Tensor]  # per block, (B, A, L + A) bool
    encodings: list[Encoding]  # per block, of action tokens
    history: torch.Tensor  # (B, Nee, Th, h), history tokens
    ref_from_ee_position: torch.Tensor  # (B, Nee, 1, 3)

    def repeat_interleave(self, times: int) -> "Context":
        """For ``times`` noisy actions per sample, side by side: every B becomes B * times."""
        return self if times == 1 else _repeat_interleave(self, times)


def _repeat_interleave(value, times: int):
    if isinstance(value, torch.Tensor):
        return value.repeat_interleave(times, 0)
    if isinstance(value, (list, tuple)):
        return type(value)(_repeat_interleave(item, times) for item in value)
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return type(value)(**{name: _repeat_interleave(item, times) for name, item in fields.items()})


class ActionExpert(nn.Module):
    """Diffusion transformer over VLM tokens and action tokens.

    Parameters with no path to the output in a stage (the last gate and projection, in Stage 1 every even one, and
    the last block's second VL norm) exist, so that checkpoints of both stages have them, but do not require gradients.
    """

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.config = config
        self.diffusion = Diffusion(config.train_timesteps, config.inference_timesteps)
        width, depth = config.width, config.num_layers

        self.proj_input = nn.Linear(config.input_dim, width)
        self.proj_pe = nn.Linear(2, width)
        nn.init.zeros_(self.proj_pe.weight)
        nn.init.zeros_(self.proj_pe.bias)
        self.proj_vl = nn.ModuleList(nn.Linear(config.input_dim, width) for _ in range(depth))
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(depth))

        self.history_mlp = MLP(ACTION_DIM - 1, width)
        self.action_mlp = MLP(ACTION_DIM, width)
        self.position_mlp = MLP(3, width, zero_init_last=True)
        self.arm_embedding = nn.Parameter(torch.randn(1, MAX_ARMS, 1, width) * 0.02)
        self.time_mlp = MLP(width, width)
        self.blocks = nn.ModuleList(
            ExpertBlock(width, config.heads, config.attention_backend) for _ in range(config.num_blocks)
        )
        self.final_norm = RMSNorm(width)
        self.action_head = nn.Linear(width, ACTION_DIM)
        nn.init.zeros_(self.action_head.weight)

        used = {self.fused_feature(block) for block in range(config.num_blocks - 1)}
        for feature in set(range(depth)) - used:
            self.proj_vl[feature].requires_grad_(False)
            self.gates[feature].requires_grad_(False)
        self.blocks[-1].norm2_vl.requires_grad_(False)

    # -- which layer does what ---------------------------------------------------------------------------------

    def fused_feature(self, block: int) -> int:
        """Index of the VLM feature fused after ``block``."""
        return block if self.config.train_stage == 1 else 2 * block + 1

    def is_language_layer(self, block: int) -> bool:
        """Whether ``block`` shows language to vision and action tokens (and encodes positions by RoPE)."""
        return self.config.train_stage == 1 and block % 2 == 0

    @property
    def required_features(self) -> tuple[int, ...]:
        """VLM features that can reach the output; the last block's cannot."""
        return tuple(self.fused_feature(block) for block in range(self.config.num_blocks - 1))

    # -- public: training and sampling ---------------------------------------------------------------------------

    def draw(
        self,
        robot: RobotState,
        pose_noise: bool = False,
        noise_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> TrainingDraws:
        """Random numbers of a training pass; see :meth:`apt.experts.base.TrainingDraws.draw`."""
        config = self.config
        return TrainingDraws.draw(
            robot, config.num_future, config.train_timesteps, pose_noise, noise_samples, generator
        )

    def forward(
        self,
        features: VLMFeatures,
        robot: RobotState,
        future: torch.Tensor,
        draws: TrainingDraws,
        gripper_mask: torch.Tensor | None = None,
    ) -> ExpertLoss:
        """Training loss on future states (B, Ta, Nee, 17) in the world frame."""
        with torch.autocast(future.device.type, enabled=False):
            centred_from_world = recentring_transform(features, draws.world_quaternion)
            features, robot = recentre(features, robot, centred_from_world)
            future = transform_states(centred_from_world, future)
            clean = self.encode_states(future, robot)  # (B, Nee, Ta, 10): from the clean pose, noise is for inputs
            samples = len(draws.noise) // len(clean)
            noisy = self.diffusion.add_noise(clean.repeat_interleave(samples, 0), draws.noise, draws.timestep)
            if draws.ee_noise is not None:
                world_from_ee = robot.world_from_ee.clone()
                world_from_ee[..., :3, 3] += draws.ee_noise
                robot = RobotState(world_from_ee, robot.world_from_ref, robot.history, robot.valid_ee)
        context = self.encode_context(features, robot, draws.history_noise).repeat_interleave(samples)
        predicted = self.denoise(context, noisy, self.modulations(draws.timestep))
        arms = [None if mask is None else mask.repeat_interleave(samples, 0) for mask in (robot.valid_ee, gripper_mask)]
        return noise_loss(predicted, draws.noise, *arms)

    def predict(
        self, features: VLMFeatures, robot: RobotState, noise: torch.Tensor, steps: int | None = None
    ) -> torch.Tensor:
        """Sampled future states (B, Ta, Nee, 17) in the world frame, from initial ``noise`` (B, Nee, Ta, 10)."""
        with torch.autocast(noise.device.type, enabled=False):  # half precision would round positions
            centred_from_world = recentring_transform(features)
            features, robot = recentre(features, robot, centred_from_world)
        context = self.encode_context(features, robot)
        timesteps = self.diffusion.timesteps(steps).to(noise.device)
        modulations = self.modulations(timesteps)  # per block, (steps, 4h): they depend on the time alone
        batch = len(noise)

        def predict_noise(action: torch.Tensor, index: int) -> torch.Tensor:
            return self.denoise(context, action, [m[index].expand(batch, -1) for m in modulations])

        action = self.diffusion.sample(predict_noise, noise, steps)
        with torch.autocast(noise.device.type, enabled=False):
            references = robot.world_from_ee[:, None], robot.world_from_ref[:, None]
            states = action_to_state(action.transpose(1, 2), *references)
            return transform_states(invert_transform(centred_from_world), states)

    # -- the two halves of a pass ----------------------------------------------------------------------------------

    def encode_context(
        self, features: VLMFeatures, robot: RobotState, history_noise: torch.Tensor | None = None
    ) -> Context:
        """Run the VL stream. Poses are already re-centred; ``history_noise`` is (B, Nee, Th, 9)."""
        length = features.modality.shape[1]
        full, va = attention_masks(features, robot.valid_ee, self.config.num_history + self.config.num_future)
        with torch.autocast(robot.world_from_ee.device.type, enabled=False):
            rotary_vl, rotary_action, pose_vl, pose_action = self._encodings(features, robot)
            ref_from_ee = invert_transform(robot.world_from_ref) @ robot.world_from_ee
            history = self.encode_states(robot.history, robot)[..., : ACTION_DIM - 1]  # (B, Nee, Th, 9)

        x = self.proj_input(features.inputs_embeds)
        is_vision = (features.camera >= 0).unsqueeze(-1)
        x = x + torch.where(is_vision, self.proj_pe(features.norm_xy.to(x.dtype)), 0.0)

        keys_values, masks, encodings = [], [], []
        for index, block in enumerate(self.blocks):
            language = self.is_language_layer(index)
            mask = full if language else va
            encoding = rotary_vl if language else pose_vl
            masks.append(mask[:, length:])
            encodings.append(rotary_action if language else pose_action)
            if index == len(self.blocks) - 1:
                keys_values.append(block.context_keys_values(x, encoding))
                break
            x, k, v = block.encode_context(x, encoding, mask[:, :length, :length])
            keys_values.append((k, v))
            feature = self.fused_feature(index)
            keep = torch.sigmoid(self.gates[feature])
            x = keep * x + (1 - keep) * self.proj_vl[feature](features.hidden_states[feature])

        position = ref_from_ee[..., :3, 3].unsqueeze(2)  # (B, Nee, 1, 3)
        if history_noise is not None:
            history = history + history_noise
        tokens = self.history_mlp(history) + self.position_mlp(position + history[..., TRANSLATION])
        tokens = self._add_identity(tokens, first_step=0)
        return Context(keys_values, masks, encodings, tokens, position)

    def denoise(self, context: Context, noisy: torch.Tensor, modulations: list[torch.Tensor]) -> torch.Tensor:
        """Predicted noise (B, Nee, Ta, 10) of noisy actions; ``modulations`` per block, (B, 4h)."""
        position = context.ref_from_ee_position + noisy[..., TRANSLATION].detach()
        future = self._add_identity(
            self.action_mlp(noisy) + self.position_mlp(position), first_step=self.config.num_history
        )
        x = torch.cat([context.history, future], dim=2)  # (B, Nee, Th + Ta, h)
        arms, steps = x.shape[1:3]
        x = x.flatten(1, 2)  # arm-major
        for index, block in enumerate(self.blocks):
            x = block.denoise(
                x, context.keys_values[index], modulations[index], context.encodings[index], context.masks[index]
            )
        x = x.unflatten(1, (arms, steps))[:, :, self.config.num_history :]
        return self.action_head(self.final_norm(x)).float()

    def modulations(self, timestep: torch.Tensor) -> list[torch.Tensor]:
        """Per block (B, 4h) of diffusion steps (B,), raw: 0 to 99."""
        time = self.time_mlp(sinusoidal_embedding(timestep, self.config.width))
        return [block.modulation(time) for block in self.blocks]

    # -- tokens ------------------------------------------------------------------------------------------------------

    @staticmethod
    def encode_states(states: torch.Tensor, robot: RobotState) -> torch.Tensor:
        """States (B, T, Nee, 17) as actions (B, Nee, T, 10)."""
        action = state_to_action(states, robot.world_from_ee[:, None], robot.world_from_ref[:, None])
        return action.transpose(1, 2)

    def _add_identity(self, tokens: torch.Tensor, first_step: int) -> torch.Tensor:
        """Add which arm, and if configured which step, to tokens (B, Nee, T, h)."""
        tokens = tokens + self.arm_embedding[:, : tokens.shape[1]]
        if self.config.action_step_embedding:
            index = torch.arange(first_step, first_step + tokens.shape[2], device=tokens.device)
            tokens = tokens + sinusoidal_embedding(index, self.config.width)
        return tokens

    def _encodings(
        self, features: VLMFeatures, robot: RobotState
    ) -> tuple[RotaryEncoding, RotaryEncoding, PoseEncoding, PoseEncoding]:
        """Rotary and pose encodings of VL tokens and of action tokens."""
        head_dim = self.config.width // self.config.heads
        steps = self.config.num_history + self.config.num_future
        arms = robot.valid_ee.shape[1]
        after = torch.arange(1, steps + 1, device=features.position.device).repeat(arms)  # every arm alike
        action_position = features.position[:, -1:] + after

        identity = torch.eye(4, device=features.camera.device, dtype=features.world_from_cam.dtype)
        with_identity = torch.cat(  # index -1 (not a vision slot) finds the identity
            [features.world_from_cam, identity.expand(len(features.camera), 1, 4, 4)], dim=1
        )
        slot = features.camera % with_identity.shape[1]
        world_from_vl = torch.gather(with_identity, 1, slot[..., None, None].expand(-1, -1, 4, 4))
        world_from_action = robot.world_from_ref.repeat_interleave(steps, dim=1)
        return (
            RotaryEncoding.at(features.position, head_dim),
            RotaryEncoding.at(action_position, head_dim),
            PoseEncoding(world_from_vl, invert_transform(world_from_vl)),
            PoseEncoding(world_from_action, invert_transform(world_from_action)),
        )


def attention_masks(
    features: VLMFeatures, valid_ee: torch.Tensor, steps_per_arm: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The full mask and the VA mask over VL and action tokens, (B, L + A, L + A) bool, True = may attend.

    Tokens of invalid arms have modality PAD, and the VA restrictions go by modality: such queries keep seeing language.
    """
    length = features.modality.shape[1]
    arm_valid = valid_ee.repeat_interleave(steps_per_arm, dim=1)  # (B, A)
    modality = torch.cat([features.modality, torch.where(arm_valid, Modality.ACTION, Modality.PAD)], dim=1)
    full = (modality != Modality.PAD).unsqueeze(1).repeat(1, modality.shape[1], 1)
    full[:, :length, length:] = False  # VL queries never see actions

    language, vision = modality == Modality.LANGUAGE, modality == Modality.VISION
    vision_or_action = vision | (modality == Modality.ACTION)
    hidden = vision_or_action.unsqueeze(2) & language.unsqueeze(1) | language.unsqueeze(2) & vision.unsqueeze(1)
    return full, full & ~hidden
