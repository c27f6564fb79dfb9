"""What a checkpoint is of, whether its tensors fit a model, and what loading them does to each of the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from apt.model.state_dict_adapter import checkpoint_stage

if TYPE_CHECKING:
    from apt.model.experts.expert import Expert


class CheckpointMismatch(ValueError):
    """A checkpoint of another stage, size or architecture than the model."""


@dataclass(frozen=True)
class Origin:
    """What kind of expert a checkpoint holds."""

    arch: str
    stage: int | None
    """0: VA prior, 1: VLA, None: nothing that can be told."""

    @classmethod
    def of(cls, content: Mapping) -> "Origin":
        """Of a checkpoint's content. Released files do not say: they hold APT experts, and their tensors tell the
        stage."""
        arch, stage = str(content.get("arch", "apt")), content.get("train_stage")
        if arch == "apt":
            return cls(arch, checkpoint_stage(content["weights"]))
        return cls(arch, stage if stage in (0, 1) else None)

    def entries(self) -> dict[str, str | int]:
        """What a checkpoint says, which :meth:`of` reads."""
        return {"arch": self.arch, "train_stage": self.stage}


@dataclass
class LoadReport:
    """What a checkpoint did, or would do, to a model's tensors. Names are those of files."""

    origin: Origin
    wanted: Origin
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
        origin, wanted = self.origin, self.wanted
        if origin.arch != wanted.arch:
            return f"it holds an expert of arch {origin.arch!r}, not {wanted.arch!r}; give --arch {origin.arch}"
        if origin.stage is None and origin.arch != "apt":
            return f"it does not say of which stage its expert of arch {origin.arch!r} is; use a file of a run"
        if origin.stage is None:
            return "it holds no action expert: its tensor names are not those of a released checkpoint"
        if origin.stage != wanted.stage:
            hint = {
                (0, 1): "; --load-from-va expands a VA prior into a VLA",
                (1, 0): "; it is a VLA already: leave --load-from-va out, or use it as a stage-1 checkpoint",
            }[origin.stage, wanted.stage]
            return f"it is a stage-{origin.stage} checkpoint, a stage-{wanted.stage} one is wanted{hint}"
        if self.mismatched:
            return f"{len(self.mismatched)} tensors differ in shape (another model size?), e.g. {self.mismatched[0]}"
        if self.vlm_dropped:
            adapters = any("lora_" in name for name in self.vlm_dropped)
            return (
                f"{len(self.vlm_dropped)} tuned VLM tensors have no place in the model, e.g. {self.vlm_dropped[0]}"
                + ("; LoRA adapters need --vlm-mode lora" if adapters else "")
            )
        return None


def plan_load(
    weights: Mapping[str, torch.Tensor],
    expert: type[Expert],
    target: Mapping[str, torch.Tensor],
    wanted: Origin,
    load_from_va: bool = False,
    vlm_weights: Mapping[str, torch.Tensor] | None = None,
    vlm_target: Mapping[str, torch.Tensor] | None = None,
    origin: Origin | None = None,
) -> LoadReport:
    """What loading would do; changes nothing.

    Args:
        weights, vlm_weights: of the file.
        expert: the model's architecture, for its rule of expansion.
        target, vlm_target: the model's tensors under the names of files (values are not read; meta tensors will do).
            Without ``vlm_target`` the VLM's tensors are left out of the report.
        wanted: what the model is.
        load_from_va: expand a VA prior into a VLA first.
        origin: what the file says it is; None: a released file, whose tensors tell.
    """
    origin = Origin.of({"weights": weights}) if origin is None else origin
    report = LoadReport(origin, Origin(wanted.arch, 0) if load_from_va else wanted)
    if origin.arch != wanted.arch:
        return report
    source = expert.expand_va(weights) if load_from_va else dict(weights)
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
