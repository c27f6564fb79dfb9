"""Say offline whether a checkpoint fits, and what a load would copy, leave fresh or drop. Exit code 0 or 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, without an installation

from apt.action_expert import MAX_ARMS, ActionExpert
from apt.checkpoint import CheckpointError, format_bytes, load_checkpoint, read_config
from apt.configs import ConfigError, train_config_from_dict
from apt.policy_config import SIZES, ExpertConfig
from apt.pretrained import LoadReport, plan_load
from apt.state_dict_adapter import checkpoint_sizes, expert_to_released


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
        report = check(content["weights"], args.train_stage, args.load_from_va, args.model)
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    describe(args.ckpt, content, report, args.names)
    if report.problem:
        print(f"error: {args.ckpt} does not fit: {report.problem}", file=sys.stderr)
        return 2
    print("fits")
    return 0


def check(weights: Mapping[str, torch.Tensor], stage: int, load_from_va: bool, model: str | None) -> LoadReport:
    """Compare with an expert of the file's own sizes, or of ``model``'s, built without memory.

    Raises:
        ValueError: the tensors are not those of an APT expert.
    """
    sizes = checkpoint_sizes(weights)
    width, head_width = SIZES[model][0] if model else sizes.width, sizes.head_width
    heads = SIZES[model][1] if model else width // head_width
    with torch.device("meta"):
        expert = ActionExpert(ExpertConfig(width, heads, sizes.depth, sizes.input_dim, stage))
        target = expert_to_released(expert.state_dict())
    return plan_load(weights, target, stage, load_from_va)


def describe(path: Path, content: dict, report: LoadReport, names: bool) -> None:
    sizes = checkpoint_sizes(content["weights"])
    size = next((name for name, (width, _) in SIZES.items() if width == sizes.width), "unnamed size")
    vlm = content.get("vlm_weights") or {}
    files = [path] if path.is_file() else list(path.iterdir())
    size_on_disk = format_bytes(sum(file.stat().st_size for file in files))
    print(f"file       {path}, {size_on_disk}, iteration {content.get('current_iters', 'unknown')}")
    print(
        f"expert     stage {report.stage}, depth {sizes.depth} ({sizes.blocks} blocks), {sizes.width} wide ({size}), "
        f"for VLM features {sizes.input_dim} wide, up to {MAX_ARMS} arms; {describe_tensors(content['weights'])}"
    )
    print(f"VLM        {describe_vlm(vlm)}")
    print(f"EMA        {describe_ema(content.get('ema'))}")
    print(f"optimizer  {describe_optimizer(path, content)}")
    try:
        config = read_config(path)
        known, unknown = train_config_from_dict(config)
        print(f"config     vlm {known.vlm}, datasets {', '.join(known.dataset_classes)}")
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
