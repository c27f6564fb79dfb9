"""Say offline whether a checkpoint fits, and what a load would copy, leave fresh or drop. Exit code 0 or 2."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, without an installation

from apt.checkpoint import CheckpointError, load_checkpoint, read_config
from apt.configs import train_config_from_dict
from apt.model.config import SIZES, meaning
from apt.model.experts.config import ExpertConfig
from apt.model.experts.expert import MAX_ARMS
from apt.model.experts.registry import get_architecture
from apt.model.pretrained import LoadReport, Origin, plan_load
from apt.model.state_dict_adapter import checkpoint_sizes
from train_utils.errors import ConfigError
from train_utils.saving import format_bytes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, type=Path, help="a ckpt_*.pt, or an exported folder")
    parser.add_argument(
        "--train-stage", required=True, type=int, choices=(0, 1), help="stage of the model to load into"
    )
    parser.add_argument("--load-from-va", action="store_true", help="expand a VA prior (stage 0) into a VLA (stage 1)")
    parser.add_argument("--model", choices=sorted(SIZES), help="size of the model (default: the file's own)")
    parser.add_argument("--names", action="store_true", help="list every tensor's name")
    args = parser.parse_args(argv)
    if args.load_from_va and args.train_stage == 0:
        print("error: --load-from-va makes a stage-1 model; give --train-stage 1", file=sys.stderr)
        return 2
    try:
        content = load_checkpoint(args.ckpt)
        report = check(content, expert_config(args.ckpt, content, args.train_stage, args.model), args.load_from_va)
        own = expert_config(args.ckpt, content, report.origin.stage, None)
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    describe(args.ckpt, content, report, own, args.names)
    if report.problem:
        print(f"error: {args.ckpt} does not fit: {report.problem}", file=sys.stderr)
        return 2
    print("fits")
    return 0


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
    width, heads = SIZES[model] if model else (sizes.width, sizes.width // sizes.head_width)
    return ExpertConfig(width, heads, sizes.depth, sizes.input_dim, stage)


def check(content: dict, config: ExpertConfig, load_from_va: bool) -> LoadReport:
    """Compare with an expert of these sizes and the file's architecture, built without memory."""
    origin = Origin.of(content)
    architecture = get_architecture(origin.arch)
    with torch.device("meta"):
        target = architecture.to_file(architecture(config).state_dict())
    wanted = Origin(origin.arch, config.train_stage)
    return plan_load(content["weights"], architecture, target, wanted, load_from_va, origin=origin)


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
    for title in ("copied", "fresh", "dropped", "mismatched"):
        tensors = getattr(report, title)
        print(f"{title:<10} {len(tensors)}")
        shown = tensors if names else tensors[:3] if title in ("dropped", "mismatched") else []
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
    return f"{ema['num_updates']} updates, decay {ema['decay']}; {describe_tensors(shadow)}"


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


if __name__ == "__main__":
    sys.exit(main())
