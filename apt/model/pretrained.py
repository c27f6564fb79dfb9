"""What a checkpoint is of, whether its tensors fit a model, and what loading them does to each of the model's.

One judgement for all who ask: training that starts from a file or goes on with it, the planner, scripts/test_ckpt.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from apt.model.experts.registry import get_architecture
from apt.model.state_dict_adapter import checkpoint_stage
from train_utils.ema import all_finite

if TYPE_CHECKING:
    from apt.model.experts.config import ExpertConfig
    from apt.model.experts.expert import Expert


OTHER_VLM = "it was trained on a VLM of other weights than the one of that name here, and reads its features wrongly"


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
    """Tensors of the model that keep their initial values, as a VLA's do that its VA prior does not have."""
    missing: list[str] = field(default_factory=list)
    """Tensors of expert and VLM that the file should hold and does not."""
    not_finite: list[str] = field(default_factory=list)
    """Tensors of the file with a NaN or an infinite number."""
    dropped: list[str] = field(default_factory=list)
    """Tensors of the file's expert that the model has no place for."""
    vlm_dropped: list[str] = field(default_factory=list)
    """The same of the file's VLM: dropping these would change the policy, so such a file does not fit."""
    other_vlm: bool = False
    """Whether the file is of a policy on a VLM of other published weights."""
    other_vlm_fits: bool = False
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
        if self.missing:
            return (
                f"it lacks {len(self.missing)} of the model's tensors, e.g. {self.missing[0]}; it is not whole, use "
                "another file of the run"
            )
        if self.vlm_dropped:
            adapters = any("lora_" in name for name in self.vlm_dropped)
            return (
                f"{len(self.vlm_dropped)} tuned VLM tensors have no place in the model, e.g. {self.vlm_dropped[0]}"
                + ("; LoRA adapters need --vlm-mode lora" if adapters else "")
            )
        if self.other_vlm and not self.other_vlm_fits:
            return OTHER_VLM + "; give --vlm the one that it was trained with"
        if self.not_finite:
            return (
                f"{len(self.not_finite)} of its tensors hold numbers that are not finite, e.g. {self.not_finite[0]}; "
                "its training had diverged, use an earlier file"
            )
        return None


@dataclass(frozen=True)
class VLMPlaces:
    """Where a file's VLM tensors can go; names are those of files."""

    target: Mapping[str, torch.Tensor]
    """All of the model's; values are not read."""
    trained: Collection[str]
    """Those that the model's mode trains, which is what a file of such a model holds."""
    read: Collection[str]
    """Those of the published weights that the policy's features depend on."""
    fingerprint: str | None
    """See :func:`apt.model.encoders.fingerprint.fingerprint`; None: of no published weights."""
    any_mode: bool = False
    """Whether the file may be of a model whose VLM trained in another mode, or in other parts."""
    any_vlm: bool = False
    """Whether it may be of a model on other published weights."""


def plan_load(
    content: Mapping, arch: str, config: ExpertConfig, load_from_va: bool = False, vlm: VLMPlaces | None = None
) -> LoadReport:
    """What loading would do; changes nothing.

    Args:
        content: of the file.
        arch, config: of the model's expert.
        load_from_va: expand a VA prior into a VLA first.
        vlm: of the model; None: the VLM's tensors are left out of the report.
    """
    weights, origin = content["weights"], Origin.of(content)
    wanted, architecture = Origin(arch, config.train_stage), get_architecture(arch)
    report = LoadReport(origin, Origin(wanted.arch, 0) if load_from_va else wanted)
    if origin.arch != wanted.arch:
        return report
    target = expert_tensors(architecture, config)
    source, due = dict(weights), set(target)
    if load_from_va:
        source = architecture.expand_va(weights)
        prior = dataclasses.replace(config, train_stage=0)
        due = set(architecture.expand_va(expert_tensors(architecture, prior)))
    report.dropped = _compare(source, target, report)
    report.fresh = [name for name in target if name not in source and name not in due]
    report.missing = [name for name in target if name not in source and name in due]
    tuned = content.get("vlm_weights") or {}
    report.not_finite = [*_not_finite(source), *_not_finite(tuned)]
    if vlm is not None:
        report.vlm_dropped = _compare(tuned, vlm.target, report)
        if not vlm.any_mode or any("lora_" in name for name in tuned):
            report.missing += [name for name in vlm.trained if name not in tuned]
        trained_on = content.get("vlm_fingerprint")
        of_others = None not in (trained_on, vlm.fingerprint) and trained_on != vlm.fingerprint
        report.other_vlm = of_others and not all(name in tuned for name in vlm.read)
        report.other_vlm_fits = vlm.any_vlm
    return report


def expert_tensors(architecture: type[Expert], config: ExpertConfig) -> dict[str, torch.Tensor]:
    """The tensors of such an expert under the names of files, without values."""
    with torch.device("meta"):
        return architecture.to_file(architecture(config).state_dict())


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


def _not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not all_finite([tensor])]
