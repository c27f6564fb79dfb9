"""Checkpoint files: write them so that a kill cannot hurt, read them so that they cannot execute anything.

Layout (released runs): ``weights``, ``vlm_weights``, ``current_iters``, ``last_ep``, ``best_score``, ``latest_score``,
``lr``, ``ema``; DDP adds ``optimizer``, ``scheduler``, ``scaler``. This project adds ``arch`` and ``train_stage``, what
kind of expert it is; ``vlm_tensors``, how many ``vlm_weights`` there are, and ``vlm_fingerprint``, of the published
weights below them; ``epoch_samples``, how far into the epoch the run was; and ``epoch_length``, by which a resumed run
notices that its data have changed. The run's configuration lies beside them as ``YYYYmmddHHMM.json``; the newest by
name counts.

Wherever a ``.pt`` is read, an exported folder (``apt/hub_folder.py``) may be given instead:

    python -m apt.checkpoint export CKPT.pt FOLDER
    python -m apt.checkpoint import FOLDER CKPT.pt
    python -m apt.checkpoint push FOLDER org/name --license apache-2.0

or the name under which it was pushed to the Hugging Face Hub, ``org/name[@revision]`` (``apt/hub.py``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import pickle
import re
import sys
import time
from pathlib import Path

import torch

from apt.hub import located, push
from apt.hub_folder import FolderError, is_exported, read_folder, read_folder_config, write_folder
from apt.model_card import model_card
from data_utils.cli import check_writable
from data_utils.files import write_text
from train_utils.places import CKPT_DIR, LATEST
from train_utils.saving import save_checkpoint

logger = logging.getLogger(__name__)

BEST = "ckpt_best.pt"
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile, FSDP, checkpointing
_CONFIG_NAME = re.compile(r"\d{12}\.json")


class CheckpointError(ValueError):
    """A checkpoint or its configuration that cannot be read; the message names the file and what to do."""


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint, a ``.pt`` or an exported folder, on the CPU, without executing anything from it.

    Raises:
        CheckpointError: no such file, not a checkpoint, or one that holds more than data.
        HubError: see :func:`apt.hub.located`.
    """
    path = located(path)
    if is_exported(path):
        try:
            return _whole(_plainly_named(read_folder(path), path), path)
        except FolderError as error:
            raise CheckpointError(str(error)) from error
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {path}, nor a run of that name under {CKPT_DIR}; check it, or train one first"
        )
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
    return _whole(_plainly_named(content, path), path)


def _plainly_named(content: dict, path: Path) -> dict:
    """With tensors under their own names, where a wrapper around the model had put its own before or between."""
    plain, wrappers = dict(content), set()
    for part in ("weights", "vlm_weights"):
        named = {}
        for name, tensor in (content.get(part) or {}).items():
            own, found = _unwrapped(name)
            if own in named:
                raise CheckpointError(f"{path} holds {own} twice, under several names; use another file")
            named[own] = tensor
            wrappers.update(found)
        if part in content:
            plain[part] = named
    if wrappers:
        logger.warning("%s: left out of the names of its tensors: %s", path, ", ".join(sorted(wrappers)))
    return plain


def _unwrapped(name: str) -> tuple[str, list[str]]:
    parts = name.split(".")
    found = [part for index, part in enumerate(parts) if part in _WRAPPERS or (part == "module" and index == 0)]
    while parts and parts[0] == "module":
        parts.pop(0)
    return ".".join(part for part in parts if part not in _WRAPPERS), found


def _whole(content: dict, path: Path) -> dict:
    saved, there = content.get("vlm_tensors"), len(content.get("vlm_weights") or {})
    if saved is not None and saved != there:
        raise CheckpointError(
            f"{path} holds {there} tensors of its VLM and was saved with {saved}: it is not whole, use another file"
        )
    return content


def _is_tensors(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(tensor, torch.Tensor) for tensor in values.values())


def find_checkpoint(name_or_path: str, ckpt_dir: str | Path) -> Path:
    """The ``.pt`` or exported folder that a path, a run's name under ``ckpt_dir``, or a repository of the Hub stands
    for.

    Raises:
        CheckpointError: there is none.
        HubError: see :func:`apt.hub.located`.
    """
    path = Path(name_or_path)
    if is_exported(path):
        return path
    if not name_or_path.endswith(".pt"):
        path = Path(ckpt_dir) / name_or_path / LATEST
        if not path.is_file() and is_exported(fetched := located(name_or_path)):
            return fetched
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
    path = located(path)
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


def checkpoint_sha256(path: Path) -> str:
    """Of a file's bytes; of a folder's files one after the other, in the order of their names."""
    path, digest = located(path), hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def export_folder(ckpt: Path, folder: Path, license_id: str | None = None) -> None:
    """Write a checkpoint, its configuration and a model card as a folder. Raises what reading and writing it raise."""
    content, config = load_checkpoint(ckpt), read_config(ckpt)
    write_folder(content, config, model_card(content, config, license_id), folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m apt.checkpoint",
        description="Between a run's .pt, a folder of safetensors, and the Hugging Face Hub.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="CKPT.pt to a folder: safetensors, configuration, model card")
    export.add_argument("ckpt", type=Path)
    export.add_argument("folder", type=Path)
    export.add_argument("--license", help="of the weights, into the card, e.g. apache-2.0")
    imported = commands.add_parser("import", help="such a folder to CKPT.pt, its configuration beside it")
    imported.add_argument("folder", type=Path)
    imported.add_argument("ckpt", type=Path)
    pushed = commands.add_parser("push", help="such a folder to the Hub, from where org/name is taken as a checkpoint")
    pushed.add_argument("folder", type=Path)
    pushed.add_argument("repo", help="org/name; made if it is not there")
    pushed.add_argument("--private", action="store_true", help="make it visible to yourself or your organisation alone")
    pushed.add_argument("--license", help="of the weights, where the card names none, e.g. apache-2.0")
    args = parser.parse_args(argv)
    try:
        if args.command == "push":
            print(f"pushed {args.folder} to {push(args.folder, args.repo, args.private, args.license)}")
            return 0
        check_writable((args.folder if args.command == "export" else args.ckpt).parent, args.command)
        if args.command == "export":
            export_folder(args.ckpt, args.folder, args.license)
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
