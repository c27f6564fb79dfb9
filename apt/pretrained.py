"""Whether a checkpoint's tensors fit a model, and what loading them does to each of the model's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from apt.state_dict_adapter import checkpoint_stage, expand_va


class CheckpointMismatch(ValueError):
    """A checkpoint of another stage, size or architecture than the model."""


@dataclass
class LoadReport:
    """What a checkpoint did, or would do, to a model's tensors. Names are released ones."""

    stage: int | None
    """Stage the file was saved in, by its number of blocks; None: not an APT expert."""
    wanted_stage: int
    copied: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    """Tensors of the model that keep their initial values."""
    dropped: list[str] = field(default_factory=list)
    """Tensors of the file's expert that the model has no place for."""
    vlm_dropped: list[str] = field(default_factory=list)
    """The same of the file's VLM: dropping these would change the policy, so such a file does not fit."""
    mismatched: list[str] = field(default_factory=list)
    """``name: (file's shape) for (model's shape)``."""

    @property
    def problem(self) -> str | None:
        """Why the file does not fit, in one line; None when it does."""
        if self.stage is None:
            return "it holds no APT action expert (tensor names are not those of a released checkpoint)"
        if self.stage != self.wanted_stage:
            hint = {
                (0, 1): "; --load-from-va expands a VA prior into a VLA",
                (1, 0): "; it is a VLA already: leave --load-from-va out, or use it as a stage-1 checkpoint",
            }[self.stage, self.wanted_stage]
            return f"it is a stage-{self.stage} checkpoint, a stage-{self.wanted_stage} one is wanted{hint}"
        if self.mismatched:
            return f"{len(self.mismatched)} tensors differ in shape (another model size?), e.g. {self.mismatched[0]}"
        if self.vlm_dropped:
            return (
                f"{len(self.vlm_dropped)} tuned VLM tensors have no place in the model (LoRA adapters need VLM mode "
                f"lora), e.g. {self.vlm_dropped[0]}"
            )
        return None


def plan_load(
    weights: Mapping[str, torch.Tensor],
    target: Mapping[str, torch.Tensor],
    train_stage: int,
    load_from_va: bool = False,
    vlm_weights: Mapping[str, torch.Tensor] | None = None,
    vlm_target: Mapping[str, torch.Tensor] | None = None,
) -> LoadReport:
    """What loading would do; changes nothing.

    Args:
        weights, vlm_weights: of the file.
        target, vlm_target: the model's tensors under released names (values are not read; meta tensors will do).
            Without ``vlm_target`` the VLM's tensors are left out of the report.
        train_stage: of the model.
        load_from_va: expand a VA prior into a VLA first.
    """
    report = LoadReport(stage=checkpoint_stage(weights), wanted_stage=0 if load_from_va else train_stage)
    source = expand_va(weights) if load_from_va else dict(weights)
    report.dropped = _compare(source, target, report)
    report.fresh = [name for name in target if name not in source]
    if vlm_weights and vlm_target is not None:
        report.vlm_dropped = _compare(vlm_weights, vlm_target, report)
    return report


def _compare(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], report: LoadReport) -> list[str]:
    """Sort the source's tensors into the report; returns those without a place."""
    dropped = []
    for name, tensor in source.items():
        if name not in target:
            dropped.append(name)
        elif tensor.shape != target[name].shape:
            report.mismatched.append(f"{name}: {tuple(tensor.shape)} for {tuple(target[name].shape)}")
        else:
            report.copied.append(name)
    return dropped
