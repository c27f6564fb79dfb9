"""Say offline whether a checkpoint fits, and what a load would copy, leave fresh or drop. Exit code 0 or 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, without an installation

from apt.action_expert import MAX_ARMS, SIZES, ActionExpert, ExpertConfig
from apt.checkpoint import CheckpointError, load_checkpoint, read_config
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
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in content["weights"].values()})
    vlm = content.get("vlm_weights") or {}
    kind = "none" if not vlm else "LoRA adapters" if any("lora_" in name for name in vlm) else "full"
    print(f"file       {path}, iteration {content.get('current_iters', 'unknown')}, {', '.join(dtypes)}")
    print(
        f"expert     stage {report.stage}, depth {sizes.depth} ({sizes.blocks} blocks), {sizes.width} wide ({size}), "
        f"for VLM features {sizes.input_dim} wide, up to {MAX_ARMS} arms"
    )
    print(f"VLM        {kind} ({len(vlm)} tensors)")
    try:
        config = read_config(path)
        print(f"config     vlm {config.get('vlm')}, datasets {', '.join(config.get('dataset_classes', []))}")
    except CheckpointError as error:
        print(f"config     {error}")
    for title in ("copied", "fresh", "dropped", "mismatched"):
        tensors = getattr(report, title)
        print(f"{title:<10} {len(tensors)}")
        shown = tensors if names else tensors[:3] if title in ("dropped", "mismatched") else []
        for name in shown:
            print(f"           {name}")


if __name__ == "__main__":
    sys.exit(main())
