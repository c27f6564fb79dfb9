"""Exponential moving average of the trained parameters, stored in torch_ema's layout."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class EMA:
    """Shadow copies of trained parameters, in module order.

    Args:
        parameters: to follow; where a back-end shards them, this rank's parts (``Backend.trained_parts``).
        decay: of the average; over the first updates at most ``(1 + n) / (10 + n)``, so that it starts from recent
            weights.
    """

    def __init__(self, parameters: list[torch.Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}; wanted a number from 0 to below 1")
        self._parameters = parameters
        self.decay = decay
        self.num_updates = 0
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current parameters."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self._parameters], 1 - decay)

    def state_dict(self, whole: list[torch.Tensor]) -> dict:
        """torch_ema's state; ``whole`` are the shadows of all ranks, joined."""
        return {"decay": self.decay, "num_updates": self.num_updates, "shadow_params": whole}

    def load_state_dict(self, state: dict, parts: list[torch.Tensor]) -> None:
        """``parts`` are this rank's parts of the state's shadows, shaped as the parameters followed.

        Raises ``ValueError`` when the shadows are not of these parameters.
        """
        check_shadow(parts, self._parameters)
        self.decay, self.num_updates = float(state["decay"]), int(state["num_updates"] or 0)
        for own, saved in zip(self.shadow, parts, strict=True):
            own.copy_(saved)


def saved_shadow(state: object) -> list[torch.Tensor]:
    """The averaged tensors of a saved state. Raises ``ValueError`` where it is not torch_ema's."""
    shadow = state.get("shadow_params") if isinstance(state, dict) else None
    if not isinstance(shadow, list) or not all(isinstance(tensor, torch.Tensor) for tensor in shadow):
        raise ValueError("the saved EMA is malformed: wanted a dict with a list of tensors, shadow_params")
    if not isinstance(state.get("decay"), float) or not isinstance(state.get("num_updates"), (int, type(None))):
        raise ValueError("the saved EMA is malformed: wanted numbers, decay and num_updates")
    return shadow


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinite number."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def check_shadow(shadow: list[torch.Tensor], parameters: list[torch.Tensor]) -> None:
    """Raise ``ValueError`` unless each shadow has its parameter's shape."""
    ours, theirs = [tuple(p.shape) for p in parameters], [tuple(s.shape) for s in shadow]
    if ours != theirs:
        raise ValueError(f"the EMA holds {len(theirs)} tensors that do not match the model's {len(ours)} trained ones")


def released_average(content: dict) -> tuple[dict, dict] | None:
    """``weights`` and ``vlm_weights`` of a checkpoint with the EMA's values, where it has the released layout.

    There the shadows follow the order of the file's own tensors: the expert's and the VLM's, or the other way round, a
    tied ``lm_head`` left out. None for files of this project, whose shadows are those of trained parameters alone.
    """
    weights, vlm = content["weights"], content.get("vlm_weights") or {}
    shadow = saved_shadow(content["ema"])
    untied = {name: tensor for name, tensor in vlm.items() if not name.endswith("lm_head.weight")}
    for tuned in (vlm, untied, {}):
        for order in ([*weights.items(), *tuned.items()], [*tuned.items(), *weights.items()]):
            if [tuple(tensor.shape) for _, tensor in order] == [tuple(tensor.shape) for tensor in shadow]:
                named = {name: value for (name, _), value in zip(order, shadow, strict=True)}
                return {n: named[n] for n in weights}, {n: named[n] for n in tuned}
    return None


@torch.no_grad()
def apply_shadow(module: nn.Module, state: dict) -> None:
    """Overwrite a module's trainable parameters with an EMA's state. Raises ``ValueError`` when it does not fit."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    shadow = saved_shadow(state)
    check_shadow(shadow, parameters)
    if not all_finite(shadow):
        raise ValueError("the EMA holds numbers that are not finite: its training had diverged; use an earlier file")
    for parameter, saved in zip(parameters, shadow, strict=True):
        parameter.copy_(saved)
