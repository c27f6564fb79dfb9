"""A short name for a model's weights, by which a policy notices that its VLM is not the one that it was trained on."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_VALUES = 64  # of each tensor; two trainings agree in none of them


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of names, shapes and some values of all parameters, the values rounded to bfloat16, so that
    it does not matter in which precision the model was loaded."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.flatten()
        some = values[:: max(1, len(values) // _VALUES)][:_VALUES].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
