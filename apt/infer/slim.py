"""A policy to hand on: one set of weights, without what only its training needed.

    python -m apt.infer.slim CKPT FOLDER --ema --bf16

An exported folder (``apt/hub_folder.py``) whose weights are the run's averages, in half the bytes, and whose
configuration names no folder of the machine that it was trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from apt.checkpoint import load_checkpoint
from apt.configs import TrainConfig
from apt.hub_folder import STATE_KEYS, write_folder
from apt.model_card import model_card
from data_utils.cli import check_writable

_OF_A_MACHINE = ("resume", "pretrained_ckpt", "load_from_va", "log_dir", "ckpt_dir", "cache_vlm_features", "device",
                 "image_text_pairs")  # fmt: skip


def slim(ckpt: Path, folder: Path, use_ema: bool, half: bool) -> None:
    """Write the folder.

    Args:
        use_ema: take the averaged weights; half: round them to bfloat16.
    Raises:
        CheckpointError, CheckpointMismatch: see :func:`apt.infer.loading.load_policy`.
        FolderError: ``folder`` exists.
    """
    from apt.infer.loading import load_policy  # seconds of imports, which --help need not wait for

    model, trained = load_policy(ckpt, use_ema=use_ema)
    dtype = torch.bfloat16 if half else torch.float32

    def kept(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}

    whole = load_checkpoint(ckpt)
    content = {key: whole[key] for key in STATE_KEYS if key in whole}
    content |= model.file_content()
    content |= {name: kept(content.get(name, {})) for name in ("weights", "vlm_weights")}
    defaults = TrainConfig().to_dict()
    config = trained.to_dict() | {name: defaults[name] for name in _OF_A_MACHINE}
    write_folder(content, config, model_card(content, config), folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m apt.infer.slim", description=__doc__.splitlines()[0])
    parser.add_argument("ckpt", type=Path, help="a run's .pt, or an exported folder")
    parser.add_argument("folder", type=Path, help="to write; must not exist")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    parser.add_argument("--bf16", action="store_true", help="round to bfloat16: half the bytes")
    args = parser.parse_args(argv)
    try:
        check_writable(args.folder.parent, "FOLDER")
        slim(args.ckpt, args.folder, args.ema, args.bf16)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in args.folder.iterdir())
    print(f"{args.folder}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
