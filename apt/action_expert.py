"""The APT action expert: token streams, masks, layer-wise gated fusion (paper section III).

VLM tokens never see action tokens, so a pass has two halves. ``encode_context`` runs the VL stream once and keeps each
block's keys and values; ``denoise`` runs the action tokens against them. Training calls each once, sampling calls
``denoise`` once per diffusion step.
"""

from __future__ import annotations

import torch
from torch import nn

from apt.action_transform import ACTION_DIM, TRANSLATION, action_to_state, state_to_action
from apt.diffusion import Diffusion, Guide, solver_step
from apt.expert_context import Context, Encoding, KeysValues, Prefix, SamplingRun, repeat_robot
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
from apt.layers.attention import AttentionMask, SelfAttention
from apt.layers.mlp import MLP, GatedMLP
from apt.layers.norms import ModulatedRMSNorm, RMSNorm
from apt.layers.positions import PoseEncoding, RotaryEncoding, sinusoidal_embedding
from apt.layers.rotations import invert_transform
from apt.policy_config import ExpertConfig

MAX_ARMS = 4


class ExpertBlock(nn.Module):
    """Pre-norm self-attention and gated MLP, shared by both streams, each with norms of its own."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.norm1_vl, self.norm2_vl = RMSNorm(width), RMSNorm(width)
        self.norm1_action, self.norm2_action = ModulatedRMSNorm(width), ModulatedRMSNorm(width)
        self.attn = SelfAttention(width, heads, backend)
        self.mlp = GatedMLP(width)

    def encode_context(
        self, x: torch.Tensor, encoding: Encoding, mask: AttentionMask
    ) -> tuple[torch.Tensor, KeysValues]:
        """VL tokens (B, L, h) after the block, and their keys and values for action tokens."""
        q, k, v = self.attn.qkv(self.norm1_vl(x), encoding)
        x = x + self.attn.attend(q, k, v, mask, encoding)
        return x + self.mlp(self.norm2_vl(x)), KeysValues(k, v)

    def context_keys_values(self, x: torch.Tensor, encoding: Encoding) -> KeysValues:
        """Keys and values alone, for the last block, whose VL output nobody reads."""
        return KeysValues(*self.attn.kv(self.norm1_vl(x), encoding))

    def modulation(self, time: torch.Tensor) -> torch.Tensor:
        """Both norms' factors and offsets (B, 4, h) of the time embedding (B, h)."""
        return torch.stack(
            [*self.norm1_action.factor_and_offset(time), *self.norm2_action.factor_and_offset(time)], dim=1
        )

    def denoise(
        self,
        x: torch.Tensor,
        context: KeysValues,
        modulation: torch.Tensor,
        encoding: Encoding,
        mask: AttentionMask,
    ) -> torch.Tensor:
        """Action tokens (B, A, h) after the block, given the context; ``modulation`` (B or 1, 4, h)."""
        factor1, offset1, factor2, offset2 = modulation.unsqueeze(2).unbind(1)
        q, k, v = self.attn.qkv(self.norm1_action(x, factor1, offset1), encoding)
        x = x + self.attn.attend(q, *context.joined(k, v), mask, encoding)
        return x + self.mlp(self.norm2_action(x, factor2, offset2))


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
        self,
        features: VLMFeatures,
        robot: RobotState,
        noise: torch.Tensor,
        steps: int | None = None,
        sampler: str = "ddim",
    ) -> torch.Tensor:
        """Sampled future states (B * S, Ta, Nee, 17) in the world frame, from ``noise`` (B * S, Nee, Ta, 10)."""
        prefix = self.encode_prefix(features, robot, len(noise) // len(robot.world_from_ee))
        return self.decode(prefix, self.sample(prefix.context, noise, self.sampling_run(steps, sampler)))

    # -- sampling, stage by stage ----------------------------------------------------------------------------------

    def encode_prefix(self, features: VLMFeatures, robot: RobotState, samples: int = 1) -> Prefix:
        """All that comes before denoising, for ``samples`` noisy actions per observation, side by side."""
        with torch.autocast(robot.history.device.type, enabled=False):  # half precision would round positions
            centred_from_world = recentring_transform(features)
            features, robot = recentre(features, robot, centred_from_world)
            world_from_centred = invert_transform(centred_from_world)
        context = self.encode_context(features, robot).repeat_interleave(samples).with_buffers()
        if samples > 1:
            world_from_centred = world_from_centred.repeat_interleave(samples, 0)
        return Prefix(context, repeat_robot(robot, samples), world_from_centred)

    def sampling_run(self, steps: int | None = None, sampler: str = "ddim") -> SamplingRun:
        """What every sampling by ``sampler`` in ``steps`` shares (None: the configured number)."""
        schedule = self.diffusion.schedule(steps, sampler).to(self.arm_embedding.device)
        modulations = self.modulations(schedule.timesteps)  # (blocks, steps, 4, h), of all steps at once
        return SamplingRun(modulations.transpose(0, 1).unsqueeze(2).contiguous(), schedule.coefficients)

    def sample(
        self, context: Context, noise: torch.Tensor, run: SamplingRun, guide: Guide | None = None, step=None
    ) -> torch.Tensor:
        """Actions (B, Nee, Ta, 10) denoised from ``noise``; ``step`` replaces :meth:`denoise_step` (compiled)."""
        step = self.denoise_step if step is None else step
        x, clean = noise, torch.zeros_like(noise)
        for modulations, coefficients in zip(run.modulations, run.coefficients, strict=True):
            x, clean = step(context, x, clean, modulations, coefficients, guide)
        return x

    def denoise_step(
        self,
        context: Context,
        x: torch.Tensor,
        previous: torch.Tensor,
        modulations: torch.Tensor,
        coefficients: torch.Tensor,
        guide: Guide | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The network and one :func:`apt.diffusion.solver_step`."""
        return solver_step(x, self.denoise(context, x, modulations), previous, coefficients, guide)

    @staticmethod
    def decode(prefix: Prefix, action: torch.Tensor) -> torch.Tensor:
        """Actions (B, Nee, Ta, 10) as states (B, Ta, Nee, 17) in the world frame."""
        with torch.autocast(action.device.type, enabled=False):
            references = prefix.robot.world_from_ee[:, None], prefix.robot.world_from_ref[:, None]
            return transform_states(prefix.world_from_centred, action_to_state(action.transpose(1, 2), *references))

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

        # What a layer's kind decides, once for all layers: masks of VL and of action queries, encodings of both.
        kinds = {}
        for language in {self.is_language_layer(index) for index in range(len(self.blocks))}:
            mask = full if language else va
            masks_of_kind = (AttentionMask.of(rows, x.dtype) for rows in (mask[:, :length, :length], mask[:, length:]))
            kinds[language] = (*masks_of_kind, *((rotary_vl, rotary_action) if language else (pose_vl, pose_action)))
        keys_values, masks, encodings = [], [], []
        for index, block in enumerate(self.blocks):
            mask, action_mask, encoding, action_encoding = kinds[self.is_language_layer(index)]
            masks.append(action_mask)
            encodings.append(action_encoding)
            if index == len(self.blocks) - 1:
                keys_values.append(block.context_keys_values(x, encoding))
                break
            x, block_keys_values = block.encode_context(x, encoding, mask)
            keys_values.append(block_keys_values)
            feature = self.fused_feature(index)
            keep = torch.sigmoid(self.gates[feature])
            x = keep * x + (1 - keep) * self.proj_vl[feature](features.hidden_states[feature])

        position = ref_from_ee[..., :3, 3].unsqueeze(2)  # (B, Nee, 1, 3)
        if history_noise is not None:
            history = history + history_noise
        tokens = self.history_mlp(history) + self.position_mlp(position + history[..., TRANSLATION])
        arms, steps = tokens.shape[1:3]
        tokens = tokens + self._identity(arms, 0, steps)
        return Context(
            keys_values, masks, encodings, tokens, self._identity(arms, steps, self.config.num_future), position
        )

    def denoise(self, context: Context, noisy: torch.Tensor, modulations: torch.Tensor) -> torch.Tensor:
        """Predicted noise (B, Nee, Ta, 10) of noisy actions; ``modulations`` (blocks, B or 1, 4, h)."""
        position = context.ref_from_ee_position + noisy[..., TRANSLATION].detach()
        future = self.action_mlp(noisy) + self.position_mlp(position) + context.future_identity
        x = torch.cat([context.history, future], dim=2)  # (B, Nee, Th + Ta, h)
        arms, steps = x.shape[1:3]
        x = x.flatten(1, 2)  # arm-major
        for index, block in enumerate(self.blocks):
            x = block.denoise(
                x, context.keys_values[index], modulations[index], context.encodings[index], context.masks[index]
            )
        x = x.unflatten(1, (arms, steps))[:, :, self.config.num_history :]
        return self.action_head(self.final_norm(x)).float()

    def modulations(self, timestep: torch.Tensor) -> torch.Tensor:
        """(blocks, B, 4, h) of diffusion steps (B,), raw: 0 to 99."""
        time = self.time_mlp(sinusoidal_embedding(timestep, self.config.width))
        return torch.stack([block.modulation(time) for block in self.blocks])

    # -- tokens ------------------------------------------------------------------------------------------------------

    @staticmethod
    def encode_states(states: torch.Tensor, robot: RobotState) -> torch.Tensor:
        """States (B, T, Nee, 17) as actions (B, Nee, T, 10)."""
        action = state_to_action(states, robot.world_from_ee[:, None], robot.world_from_ref[:, None])
        return action.transpose(1, 2)

    def _identity(self, arms: int, first_step: int, steps: int) -> torch.Tensor:
        """Which arm, and if configured which step, tokens are: (1, arms, 1 or steps, h)."""
        identity = self.arm_embedding[:, :arms]
        if self.config.action_step_embedding:
            index = torch.arange(first_step, first_step + steps, device=identity.device)
            identity = identity + sinusoidal_embedding(index, self.config.width)
        return identity

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
