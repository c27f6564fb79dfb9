"""Which parameters get which learning rate and decay, and the learning rate over time."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, max_lr: float, wd: float, vlm_lr: float | None = None, vlm_wd: float = 0.0
) -> torch.optim.AdamW:
    """AdamW over trainable parameters in four groups: expert / VLM x decay / no decay.

    Biases and norms do not decay; nor do the VLM's token and position embeddings. The VLM's parameters are those named
    ``vlm.*``.
    """
    groups = {
        key: {"params": [], "weight_decay": decay, "max_lr": lr, "name": key}
        for key, decay, lr in (
            ("expert_decay", wd, max_lr),
            ("expert_no_decay", 0.0, max_lr),
            ("vlm_decay", vlm_wd, max_lr if vlm_lr is None else vlm_lr),
            ("vlm_no_decay", 0.0, max_lr if vlm_lr is None else vlm_lr),
        )
    }
    norms = {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "vlm" if name.startswith("vlm.") else "expert"
        plain = name.endswith("bias") or id(parameter) in norms
        embedding = part == "vlm" and ("embed_tokens" in name or "pos_embed" in name)
        groups[f"{part}_{'no_decay' if plain or embedding else 'decay'}"]["params"].append(parameter)
    used = [group for group in groups.values() if group["params"]]
    return torch.optim.AdamW(used, lr=max_lr, fused=True)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, num_warmup: int, num_decay: int = 0, last_step: int = 0
) -> None:
    """Linear warm-up, constant, and over the ``num_decay`` steps that end with ``last_step`` linear to a last step of
    ``1 / num_decay``. Steps count from 0."""
    factor = min(1.0, (step + 1) / num_warmup) if num_warmup else 1.0
    if num_decay:
        factor *= min(1.0, (last_step + 1 - step) / num_decay)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * factor


def check_moments(state: object, parameter: torch.Tensor, index: int) -> None:
    """Raise ``ValueError`` unless ``state`` is what AdamW keeps of a parameter: its step and two moments of its shape.

    Args:
        index: of the parameter, for the message.
    """
    if not isinstance(state, dict) or not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
        raise ValueError(f"the state of tensor {index} is not AdamW's (step, exp_avg, exp_avg_sq)")
    step = state["step"]
    if not isinstance(step, (int, float)) and not (isinstance(step, torch.Tensor) and step.numel() == 1):
        raise ValueError(f"the step of tensor {index} is a {type(step).__name__}, wanted a number")
    for name in ("exp_avg", "exp_avg_sq"):
        shape = tuple(getattr(state[name], "shape", ()))
        if not isinstance(state[name], torch.Tensor) or shape != tuple(parameter.shape):
            raise ValueError(f"{name} of tensor {index} has shape {shape}, this run's has {tuple(parameter.shape)}")
