"""Checkpoint files: write them so that a kill cannot hurt, read them so that they cannot execute anything.

Layout (released runs): ``weights``, ``vlm_weights``, ``current_iters``, ``last_ep``, ``best_score``, ``latest_score``,
``lr``, ``ema``; DDP adds ``optimizer``, ``scheduler``, ``scaler``. This project adds ``arch`` and ``train_stage``, what
kind of expert it is; ``epoch_samples``, how far into the epoch the run was; and ``epoch_length``, by which a resumed
run notices that its data have changed. The run's configuration lies beside them as ``YYYYmmddHHMM.json``; the newest by
name counts.

Wherever a ``.pt`` is read, an exported folder (``apt/hub_folder.py``) may be given instead:

    python -m apt.checkpoint export CKPT.pt FOLDER
    python -m apt.checkpoint import FOLDER CKPT.pt
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import sys
import time
from pathlib import Path

import torch

from apt.hub_folder import FolderError, is_exported, read_folder, read_folder_config, write_folder
from data_utils.files import write_text
from train_utils.saving import save_checkpoint

LATEST = "ckpt_latest.pt"
BEST = "ckpt_best.pt"
_CONFIG_NAME = re.compile(r"\d{12}\.json")


class CheckpointError(ValueError):
    """A checkpoint or its configuration that cannot be read; the message names the file and what to do."""


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint, a ``.pt`` or an exported folder, on the CPU, without executing anything from it.

    Raises:
        CheckpointError: no such file, not a checkpoint, or one that holds more than data.
    """
    path = Path(path)
    if is_exported(path):
        try:
            return read_folder(path)
        except FolderError as error:
            raise CheckpointError(str(error)) from error
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; check the path, or train one first (scripts/train.sh)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, numbers and texts, and nothing else is loaded; use another file"
        ) from error
    except Exception as error:  # torch raises many kinds here; all of them mean that the file is of no use
        raise CheckpointError(
            f"{path} is damaged or was not written by torch.save ({type(error).__name__}); use another file"
        ) from error
    if not isinstance(content, dict) or not _is_tensors(content.get("weights")):
        raise CheckpointError(f"{path} is not an APT checkpoint: it has no tensors 'weights'; use a ckpt_*.pt of a run")
    if not _is_tensors(content.get("vlm_weights") or {}):
        raise CheckpointError(f"{path}: its 'vlm_weights' are not tensors by name; use a ckpt_*.pt of a run")
    return content


def _is_tensors(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(tensor, torch.Tensor) for tensor in values.values())


def find_checkpoint(name_or_path: str, ckpt_dir: str | Path) -> Path:
    """The ``.pt`` or exported folder that a path, or a run's name under ``ckpt_dir``, stands for.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(name_or_path)
    if is_exported(path):
        return path
    if not name_or_path.endswith(".pt"):
        path = Path(ckpt_dir) / name_or_path / LATEST
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give a .pt file or the name of a run under {ckpt_dir}")
    return path


def write_config(folder: Path, values: dict) -> Path:
    """Write a run's configuration under its start time, never over an older one."""
    moment = time.time()
    while (path := folder / time.strftime("%Y%m%d%H%M.json", time.localtime(moment))).exists():
        moment += 60
    write_text(path, json.dumps(values, indent=2) + "\n")
    return path


def read_config(path: Path) -> dict:
    """The configuration that belongs to a checkpoint: the newest beside a ``.pt``, or an exported folder's own.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if is_exported(path):
        try:
            return read_folder_config(path)
        except FolderError as error:
            raise CheckpointError(str(error)) from error
    folder = path.parent
    candidates = sorted(path for path in folder.glob("*.json") if _CONFIG_NAME.fullmatch(path.name))
    if not candidates:
        raise CheckpointError(f"no configuration (YYYYmmddHHMM.json) in {folder}; it belongs beside the checkpoint")
    try:
        values = json.loads(candidates[-1].read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{candidates[-1]} is not valid JSON ({error}); restore it or remove it") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{candidates[-1]} holds no configuration: wanted a JSON object")
    return values


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m apt.checkpoint",
        description="Between a run's .pt and a folder of safetensors for the Hugging Face Hub.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="CKPT.pt to a folder: safetensors, configuration, model card")
    export.add_argument("ckpt", type=Path)
    export.add_argument("folder", type=Path)
    imported = commands.add_parser("import", help="such a folder to CKPT.pt, its configuration beside it")
    imported.add_argument("folder", type=Path)
    imported.add_argument("ckpt", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.command == "export":
            write_folder(load_checkpoint(args.ckpt), read_config(args.ckpt), args.folder)
            print(f"exported {args.ckpt} to {args.folder}: {', '.join(sorted(os.listdir(args.folder)))}")
        else:
            if args.ckpt.exists():
                raise CheckpointError(f"{args.ckpt} exists; remove it or choose another name")
            if not is_exported(args.folder):
                raise CheckpointError(f"{args.folder} is no exported checkpoint; make one with export")
            content, config = load_checkpoint(args.folder), read_config(args.folder)
            args.ckpt.parent.mkdir(parents=True, exist_ok=True)
            print(f"imported {args.folder} to {args.ckpt}, configuration {write_config(args.ckpt.parent, config)}")
            save_checkpoint(content, args.ckpt)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
