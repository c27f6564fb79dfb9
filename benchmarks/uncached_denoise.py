"""The baseline of ``denoise.py``: sampling as the paper writes it down, without any of this project's short cuts.

Every denoising step runs the joint pass over all tokens: the VL stream is computed again, masks are made and time is
embedded again, and diffusers' own scheduler takes the step. Same weights, same numbers.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

from apt.model.action_scale import ACTION_DIM, TRANSLATION
from apt.model.action_transform import action_to_state
from apt.model.experts.apt import ActionExpert, attention_masks
from apt.model.experts.base import RobotState, VLMFeatures, recentre, recentring_transform, transform_states
from apt.model.layers.attention import AttentionMask
from apt.model.layers.positions import PoseEncoding, RotaryEncoding, sinusoidal_embedding
from apt.model.layers.rotations import invert_transform


def joint_pass(
    expert: ActionExpert, features: VLMFeatures, robot: RobotState, noisy: torch.Tensor, timestep: int
) -> torch.Tensor:
    """The prediction (B, Nee, Ta, 10) for noisy scaled actions; poses are already re-centred."""
    config, length = expert.config, features.modality.shape[1]
    arms, steps = noisy.shape[1], config.num_history + config.num_future
    full, va = attention_masks(features, robot.valid_ee, steps)
    rotary_vl, rotary_action, pose_vl, pose_action = expert._encodings(features, robot)
    rotary = RotaryEncoding(
        torch.cat([rotary_vl.cos, rotary_action.cos], 1), torch.cat([rotary_vl.sin, rotary_action.sin], 1)
    )
    world_from_token = torch.cat([pose_vl.world_from_token, pose_action.world_from_token], 1)
    poses = PoseEncoding(world_from_token, invert_transform(world_from_token))

    x_vl = expert.proj_input(features.inputs_embeds)
    x_vl = x_vl + torch.where((features.camera >= 0).unsqueeze(-1), expert.proj_pe(features.norm_xy), 0.0)
    position = (invert_transform(robot.world_from_ref) @ robot.world_from_ee)[..., :3, 3].unsqueeze(2)
    history = expert.encode_states(robot.history, robot)[..., : ACTION_DIM - 1]
    metres = noisy[..., TRANSLATION] * expert.action_scale[TRANSLATION]
    tokens = [
        expert.history_mlp(history) + expert.position_mlp(position + history[..., TRANSLATION]),
        expert.action_mlp(noisy) + expert.position_mlp(position + metres),
    ]
    x = torch.cat(tokens, dim=2) + expert.arm_embedding[:, :arms]
    if config.action_step_embedding:
        x = x + sinusoidal_embedding(torch.arange(steps, device=x.device), config.width)
    x = x.flatten(1, 2)
    time = torch.full((len(x),), timestep, device=x.device)
    time = expert.time_mlp(sinusoidal_embedding(time, config.width))

    for index, block in enumerate(expert.blocks):
        language = expert.is_language_layer(index)
        encoding, mask = (rotary, full) if language else (poses, va)
        factor1, offset1, factor2, offset2 = block.modulation(time).unsqueeze(2).unbind(1)
        joint = torch.cat([block.norm1_vl(x_vl), block.norm1_action(x, factor1, offset1)], dim=1)
        q, k, v = block.attn.qkv(joint, encoding)
        attended = block.attn.attend(q, k, v, AttentionMask.of(mask, q.dtype), encoding)
        x_vl, x = x_vl + attended[:, :length], x + attended[:, length:]
        normed = torch.cat([block.norm2_vl(x_vl), block.norm2_action(x, factor2, offset2)], dim=1)
        moved = block.mlp(normed)
        x_vl, x = x_vl + moved[:, :length], x + moved[:, length:]
        feature = expert.fused_feature(index)
        if feature in features.hidden_states:
            keep = torch.sigmoid(expert.gates[feature])
            x_vl = keep * x_vl + (1 - keep) * expert.proj_vl[feature](features.hidden_states[feature])
    x = x.unflatten(1, (arms, steps))[:, :, config.num_history :]
    return expert.action_head(expert.final_norm(x)).float()


@torch.no_grad()
def uncached_predict(
    expert: ActionExpert, features: VLMFeatures, robot: RobotState, noise: torch.Tensor, steps: int = 20
) -> torch.Tensor:
    """Sampled future states (B, Ta, Nee, 17) in the world frame, by DDIM from ``noise`` (B, Nee, Ta, 10)."""
    centred_from_world = recentring_transform(features)
    features, robot = recentre(features, robot, centred_from_world)
    scheduler = DDIMScheduler(
        num_train_timesteps=expert.config.train_timesteps,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=expert.objective.prediction,
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    action = noise
    for timestep in scheduler.timesteps.tolist():
        action = scheduler.step(joint_pass(expert, features, robot, action, timestep), timestep, action).prev_sample
    action = action * expert.action_scale
    states = action_to_state(action.transpose(1, 2), robot.world_from_ee[:, None], robot.world_from_ref[:, None])
    return transform_states(invert_transform(centred_from_world), states)
