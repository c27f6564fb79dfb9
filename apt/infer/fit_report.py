"""What scripts/test_ckpt.py says of a checkpoint: what it holds, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from apt.checkpoint import CheckpointError, load_checkpoint, read_config
from apt.configs import train_config_from_dict
from apt.model.config import SIZES, meaning
from apt.model.encoders.hub import VLMLoadError
from apt.model.experts.config import ExpertConfig
from apt.model.experts.expert import MAX_ARMS
from apt.model.experts.registry import get_architecture
from apt.model.pretrained import OTHER_VLM, LoadReport, Origin, plan_load
from apt.model.state_dict_adapter import checkpoint_sizes
from apt.model.vla import VLA
from train_utils.ema import all_finite
from train_utils.errors import ConfigError
from train_utils.saving import format_bytes


def report_fit(path: Path, stage: int, load_from_va: bool, model: str | None, names: bool) -> str | None:
    """Print all about a checkpoint; returns why it does not fit a model of ``stage``, None where it does.

    Args:
        path: a ``.pt`` or an exported folder.
        model: size of the model; None: the file's own.
        names: print every tensor's name.
    Raises:
        CheckpointError, ValueError: it cannot be read, or neither it nor its configuration tells what it is of.
    """
    content = load_checkpoint(path)
    report, unchecked = judge(path, content, stage, model, load_from_va)
    describe(path, content, report, expert_config(path, content, report.origin.stage, None), names)
    if unchecked:
        print(f"unchecked  whether its VLM fits: {unchecked}")
    elif report.other_vlm:
        print(f"note       {OTHER_VLM}")
    return report.problem


def expert_config(path: Path, content: dict, stage: int, model: str | None) -> ExpertConfig:
    """Sizes of the file's expert at ``stage``, or ``model``'s. An APT expert's tensors tell them; for another
    architecture the run's configuration does.

    Raises:
        ValueError: the tensors are not those of an APT expert.
        CheckpointError, ConfigError: another architecture, and no configuration of use.
    """
    if Origin.of(content).arch != "apt":
        policy = train_config_from_dict(read_config(path))[0].vla_config()
        mode = policy.vlm_mode if stage == 1 else "frozen"
        return dataclasses.replace(
            policy, model=model or policy.model, train_stage=stage, vlm_mode=mode
        ).expert_config()
    sizes = checkpoint_sizes(content["weights"])
    if model is not None and model not in SIZES:
        raise ValueError(f"unknown model size {model!r}; choose from {', '.join(SIZES)}")
    width, heads = SIZES[model] if model else (sizes.width, sizes.width // sizes.head_width)
    return ExpertConfig(width, heads, sizes.depth, sizes.input_dim, stage)


def judge(
    path: Path, content: dict, stage: int, model: str | None, load_from_va: bool
) -> tuple[LoadReport, str | None]:
    """What the planner, or a training that starts from the file, would say; and why nothing is said about the VLM,
    where its configuration or its weights are not at hand.

    Raises:
        CheckpointError, ValueError: neither the file nor its configuration tells what to load it into.
    """
    origin = Origin.of(content)
    try:
        trained = train_config_from_dict(read_config(path))[0]
        policy = trained.vla_config()
        policy = dataclasses.replace(
            policy, train_stage=stage, vlm_mode=policy.vlm_mode if stage else "frozen", model=model or policy.model
        )
        vla = VLA(policy, torch.bfloat16, torch.bfloat16, random_vlm=trained.random_vlm)
    except (CheckpointError, ConfigError, VLMLoadError) as error:
        return plan_load(content, origin.arch, expert_config(path, content, stage, model), load_from_va), str(error)
    return vla.plan(content, load_from_va, any_mode=load_from_va, any_vlm=load_from_va), None


def describe(path: Path, content: dict, report: LoadReport, own: ExpertConfig, names: bool) -> None:
    """``own``: the sizes of the file's expert, in its own stage."""
    size = next((name for name, (width, _) in SIZES.items() if width == own.width), "unnamed size")
    vlm = content.get("vlm_weights") or {}
    files = [path] if path.is_file() else list(path.iterdir())
    size_on_disk = format_bytes(sum(file.stat().st_size for file in files))
    print(f"file       {path}, {size_on_disk}, iteration {content.get('current_iters', 'unknown')}")
    print(
        f"expert     arch {report.origin.arch}, stage {report.origin.stage}, depth {own.num_layers} "
        f"({get_architecture(report.origin.arch).num_blocks(own)} blocks), {own.width} wide ({size}), for VLM features "
        f"{own.input_dim} wide, up to {MAX_ARMS} arms; {describe_tensors(content['weights'])}"
    )
    print(f"VLM        {describe_vlm(vlm)}")
    print(f"EMA        {describe_ema(content.get('ema'))}")
    print(f"optimizer  {describe_optimizer(path, content)}")
    try:
        config = read_config(path)
        known, unknown = train_config_from_dict(config)
        print(f"config     vlm {known.vlm}, datasets {', '.join(known.dataset_classes)}")
        print(f"weights    {', '.join(f'{field} {value}' for field, value in meaning(known.to_dict()).items())}")
        if unknown:
            print(f"           ignored, unknown to this version: {', '.join(unknown)}")
    except (CheckpointError, ConfigError) as error:
        print(f"config     {error}")
    for title in ("copied", "fresh", "dropped", "mismatched", "missing", "not_finite"):
        tensors = getattr(report, title)
        print(f"{title.replace('_', ' '):<10} {len(tensors)}")
        shown = tensors if names else [] if title in ("copied", "fresh") else tensors[:3]
        for name in shown:
            print(f"           {name}")


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Number, parameters and data types."""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return f"{len(tensors)} tensors, {numbers / 1e6:.2f}M parameters, {', '.join(dtypes)}"


def describe_vlm(tensors: Mapping[str, torch.Tensor]) -> str:
    if not tensors:
        return "as published: the file holds no tuned weights"
    ranks = sorted({len(tensor) for name, tensor in tensors.items() if "lora_A" in name})
    kind = f"LoRA adapters of rank {', '.join(map(str, ranks))}" if ranks else "tuned in full"
    return f"{kind}; {describe_tensors(tensors)}"


def describe_ema(ema: dict | None) -> str:
    if not ema:
        return "none"
    shadow = {str(index): tensor for index, tensor in enumerate(ema["shadow_params"])}
    broken = "" if all_finite(shadow.values()) else ", NOT FINITE"
    return f"{ema['num_updates']} updates, decay {ema['decay']}; {describe_tensors(shadow)}{broken}"


def describe_optimizer(path: Path, content: dict) -> str:
    """Of DDP inside the file, of DeepSpeed beside it."""
    if state := content.get("optimizer"):
        moments = [entry for entry in state["state"].values() if "exp_avg" in entry]
        if not moments:
            return "in the file (DDP), of an unknown kind"
        step = max(int(entry["step"]) for entry in moments)
        return f"in the file (DDP): AdamW at step {step}, {len(moments)} tensors in {len(state['param_groups'])} groups"
    shards = sorted(path.parent.glob(f"{path.stem}_opt_rank*.pt")) if path.is_file() else []
    if shards:
        return f"beside the file (DeepSpeed), of {len(shards)} processes"
    return "none (DeepSpeed without its shards, or an export): a resumed run starts it fresh"
