"""The APT action expert: token streams, masks, layer-wise gated fusion (paper section III)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from apt.model.experts.base import Modality, RobotState, VLMFeatures, VLMReads
from apt.model.experts.config import ExpertConfig
from apt.model.experts.context import Encoding, JointContext, KeysValues
from apt.model.experts.expert import Expert
from apt.model.layers.attention import AttentionMask, SelfAttention
from apt.model.layers.mlp import GatedMLP
from apt.model.layers.norms import ModulatedRMSNorm, RMSNorm
from apt.model.layers.positions import PoseEncoding, RotaryEncoding
from apt.model.layers.rotations import invert_transform
from apt.model.state_dict_adapter import expand_va, expert_from_released, expert_to_released


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
        """Action tokens (B * K, A, h) after the block, given a context of batch B; ``modulation`` (B * K or 1, 4, h).

        The K draws of a sample attend side by side.
        """
        factor1, offset1, factor2, offset2 = modulation.unsqueeze(2).unbind(1)
        normed = self.norm1_action(x, factor1, offset1).reshape(len(context.keys), -1, x.shape[-1])  # (B, K * A, h)
        q, k, v = self.attn.qkv(normed, encoding)
        x = x + self.attn.attend(q, *context.joined(k, v), mask, encoding).reshape(x.shape)
        return x + self.mlp(self.norm2_action(x, factor2, offset2))


class ActionExpert(Expert):
    """Diffusion transformer over VLM tokens and action tokens.

    Stage 1 has N/2 vision-action blocks; Stage 2 puts a language block before each. Parameters with no path to the
    output in a stage (the last gate and projection, in Stage 1 every even one, and the last block's second VL norm)
    exist, so that checkpoints of both stages have them, but do not require gradients.
    """

    carries_vl_tokens = True

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__(config)
        self.proj_input = nn.Linear(config.input_dim, config.width)
        self.proj_pe = nn.Linear(2, config.width)
        nn.init.zeros_(self.proj_pe.weight)
        nn.init.zeros_(self.proj_pe.bias)
        self.blocks = nn.ModuleList(
            ExpertBlock(config.width, config.heads, config.attention_backend) for _ in range(self.num_blocks(config))
        )
        self.blocks[-1].norm2_vl.requires_grad_(False)
        self._build_fusion()

    # -- what differs from fusion to fusion ----------------------------------------------------------------------------

    def _build_fusion(self) -> None:
        config = self.config
        self.proj_vl = nn.ModuleList(nn.Linear(config.input_dim, config.width) for _ in range(config.num_layers))
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(config.width)) for _ in range(config.num_layers))
        for feature in set(range(config.num_layers)) - set(self._fused_features()):
            self.proj_vl[feature].requires_grad_(False)
            self.gates[feature].requires_grad_(False)

    @property
    def reads(self) -> VLMReads:
        return VLMReads(hidden_states=self._fused_features(), inputs_embeds=True)

    def _enter(self, features: VLMFeatures) -> torch.Tensor:
        """What VL tokens start from, (B, L, C)."""
        return features.inputs_embeds

    def _fuse(self, x: torch.Tensor, block: int, features: VLMFeatures) -> torch.Tensor:
        """VL tokens (B, L, h) after ``block``, with the VLM's own."""
        feature = self.fused_feature(block)
        keep = torch.sigmoid(self.gates[feature])
        return keep * x + (1 - keep) * self.proj_vl[feature](features.hidden_states[feature])

    def fused_feature(self, block: int) -> int:
        """Index of the VLM feature fused after ``block``."""
        return block if self.config.train_stage == 1 else 2 * block + 1

    def _fused_features(self) -> tuple[int, ...]:
        """VLM features that can reach the output; the last block's cannot."""
        return tuple(self.fused_feature(block) for block in range(self.num_blocks(self.config) - 1))

    def fusion_gates(self) -> list[tuple[int, str, nn.Parameter]]:
        kinds = ["language" if self.is_language_layer(block) else "vision-action" for block in range(len(self.blocks))]
        return [(feature, kinds[block], self.gates[feature]) for block, feature in enumerate(self._fused_features())]

    def bare_parameters(self) -> list[nn.Parameter]:
        last_projection = self.blocks[-1].attn.to_qkv  # of which the VL stream needs a part
        return [*super().bare_parameters(), *self.gates, *last_projection.parameters()]

    # -- stages and files ----------------------------------------------------------------------------------------------

    @staticmethod
    def num_blocks(config: ExpertConfig) -> int:
        return config.num_layers if config.train_stage == 1 else config.num_layers // 2

    def is_language_layer(self, block: int) -> bool:
        """Whether ``block`` shows language to vision and action tokens (and encodes positions by RoPE)."""
        return self.config.train_stage == 1 and block % 2 == 0

    @staticmethod
    def to_file(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return expert_to_released(state)

    @staticmethod
    def from_file(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return expert_from_released(weights)

    @staticmethod
    def expand_va(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Block i becomes 2i + 1, even blocks stay fresh, every other tensor is copied."""
        return expand_va(weights)

    # -- the VL stream and the action stream ---------------------------------------------------------------------------

    def encode_vl(self, features: VLMFeatures, robot: RobotState) -> JointContext:
        """Run the VL stream, keeping each block's keys and values."""
        length = features.modality.shape[1]
        full, va = attention_masks(features, robot.valid_ee, self.steps_per_arm)
        with torch.autocast(robot.world_from_ee.device.type, enabled=False):
            rotary_vl, rotary_action, pose_vl, pose_action = self._encodings(features, robot)

        x = self.proj_input(self._enter(features))
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
            x = self._fuse(x, index, features)
        return JointContext(keys_values, masks, encodings)

    def run_blocks(self, x: torch.Tensor, context: JointContext, modulations: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            x = block.denoise(
                x, context.keys_values[index], modulations[index], context.encodings[index], context.masks[index]
            )
        return x

    def _encodings(
        self, features: VLMFeatures, robot: RobotState
    ) -> tuple[RotaryEncoding, RotaryEncoding, PoseEncoding, PoseEncoding]:
        """Rotary and pose encodings of VL tokens and of action tokens."""
        head_dim = self.config.width // self.config.heads
        steps, arms = self.steps_per_arm, robot.valid_ee.shape[1]
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
