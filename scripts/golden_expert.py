"""The expert half of the golden check: this project's expert against recorded numbers of the released one.

A golden folder holds ``config.json``, ``inputs.safetensors`` and ``stage{0,1}_{weights,expected}.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from apt.model.experts.apt import ActionExpert, attention_masks
from apt.model.experts.base import RobotState, TrainingDraws, VLMFeatures, recentre, recentring_transform
from apt.model.experts.config import ExpertConfig
from apt.model.state_dict_adapter import expert_from_released, expert_to_released
from apt.model.vlm import vision_slots

Report = Callable[[str, float, float], None]


def features_from_golden(inputs: dict[str, torch.Tensor]) -> VLMFeatures:
    """Per-token features from a golden folder's per-slot ones.

    Vision tokens belong to the valid cameras in order, Lv (``norm_xy_ds``'s third axis) tokens each.
    """
    camera_mask, is_vision = inputs["vl.camera_mask"], inputs["vl.is_vision_mask"]
    camera, token = vision_slots(is_vision, camera_mask, inputs["vl.norm_xy_ds"].shape[2])
    norm_xy = inputs["vl.norm_xy_ds"][torch.arange(len(camera))[:, None], camera, token]
    hidden = {int(n.rsplit(".", 1)[1]): t for n, t in inputs.items() if n.startswith("vl.hidden_states.")}
    return VLMFeatures(
        inputs_embeds=inputs["vl.inputs_embeds"],
        hidden_states=hidden,
        modality=inputs["vl.modality_type"],
        position=inputs["vl.pos_id_1d"],
        camera=camera,
        norm_xy=torch.where(is_vision.unsqueeze(-1), norm_xy, 0.0),
        world_from_cam=inputs["vl.extrinsics"],
        camera_mask=camera_mask,
    )


def load_expert(folder: Path, stage: int) -> tuple[ActionExpert, list[str]]:
    """The expert of a golden folder and its missing or unexpected tensor names."""
    config = json.loads((folder / "config.json").read_text())
    expert = ActionExpert(
        ExpertConfig(
            width=config["hdim"],
            heads=config["num_heads"],
            num_layers=config["num_layers"],
            input_dim=config["input_dim"],
            train_stage=stage,
            num_history=config["num_history"],
            num_future=config["num_future"],
            train_timesteps=config["diffusion_timesteps"],
            inference_timesteps=config["inference_timesteps"],
        )
    ).eval()
    released = load_file(folder / f"stage{stage}_weights.safetensors")
    keys = expert.load_state_dict(expert_from_released(released), strict=False)
    faults = list(keys.missing_keys) + list(keys.unexpected_keys)
    faults += sorted(set(expert_to_released(expert.state_dict())) ^ set(released))  # and the way back
    return expert, faults


def check_expert(folder: Path, report: Report) -> None:
    """Report every quantity of both stages: name, error (relative to its largest magnitude), tolerance."""
    inputs = load_file(folder / "inputs.safetensors")
    for stage in (0, 1):
        _check_stage(folder, stage, inputs, report)


def _check_stage(folder: Path, stage: int, inputs: dict[str, torch.Tensor], report: Report) -> None:
    expected = load_file(folder / f"stage{stage}_expected.safetensors")
    expert, name_faults = load_expert(folder, stage)

    def compare(name: str, got: torch.Tensor, tolerance: float) -> None:
        want = expected[name]
        got = got.detach().to(want.dtype).reshape(want.shape)
        if want.dtype == torch.bool:
            error = float((got != want).sum())
        else:
            error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-12))
        report(f"stage{stage}.{name}", error, tolerance)

    report(f"stage{stage}.tensor_names_missing_or_unexpected", float(len(name_faults)), 0.0)
    features = features_from_golden(inputs)
    robot = RobotState(
        inputs["current_ee_pose"], inputs["action_ref_pose"], inputs["history_ee_states"], inputs["valid_ee_mask"]
    )
    masks = attention_masks(features, robot.valid_ee, expert.config.num_history + expert.config.num_future)
    even, odd = (masks[0 if expert.is_language_layer(block) else 1] for block in (0, 1))
    compare("mask.active_even", even, 0.0)
    compare("mask.active_odd", odd, 0.0)

    draws = TrainingDraws(inputs["draw.world_quat_wxyz"], inputs["draw.noise"], inputs["draw.timestep"])
    loss = expert(features, robot, inputs["gt_future_ee_states"], draws)
    loss.total.backward()
    compare("train.total_loss", loss.total, 1e-4)
    compare("train.metric.total_loss", loss.total, 1e-4)
    compare("train.metric.pos_loss", loss.translation, 1e-4)
    compare("train.metric.rot_loss", loss.rotation, 1e-4)
    compare("train.metric.openness_loss", loss.gripper, 1e-4)
    gate_grads = [torch.zeros_like(gate) if gate.grad is None else gate.grad for gate in expert.gates]
    compare("train.grad.gate", torch.stack(gate_grads), 1e-3)
    compare("train.grad.act_head.weight", expert.action_head.weight.grad, 1e-3)
    compare("train.grad.proj_input.weight", expert.proj_input.weight.grad, 1e-3)

    with torch.no_grad():
        timestep = expert.objective.schedule().timesteps[:1].expand(len(inputs["draw.noise"]))
        context = expert.encode_context(*recentre(features, robot, recentring_transform(features)))
        noise_pred = expert.denoise(context, inputs["draw.noise"], expert.modulations(timestep))
        history_action = expert.encode_states(robot.history, robot)
        states = expert.predict(features, robot, inputs["draw.noise"])
    compare("infer.first_step.timestep", timestep, 0.0)
    compare("infer.first_step.noise_pred", noise_pred, 1e-4)
    compare("infer.history_action", history_action, 1e-4)
    compare("infer.future_ee_states", states, 1e-3)
