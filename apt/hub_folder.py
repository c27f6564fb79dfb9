"""A checkpoint as a folder of safetensors, configuration and model card: what the Hugging Face Hub takes.

    action_expert.safetensors   ``weights``, names as in the .pt
    vlm.safetensors             ``vlm_weights``, where the VLM was tuned
    ema.safetensors             shadow parameters, in module order, where the run averaged its weights
    config.json                 the run's configuration
    state.json                  architecture, stage, iteration and scores
    README.md                   the model card

Optimizer state stays with the ``.pt``: a folder is to start from or to serve, not to resume.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

EXPERT_FILE = "action_expert.safetensors"
VLM_FILE = "vlm.safetensors"
EMA_FILE = "ema.safetensors"
CONFIG_FILE = "config.json"
STATE_FILE = "state.json"
CARD_FILE = "README.md"
FILES = (EXPERT_FILE, VLM_FILE, EMA_FILE, CONFIG_FILE, STATE_FILE, CARD_FILE)
STATE_KEYS = (
    "arch",
    "train_stage",
    "vlm_tensors",
    "vlm_fingerprint",
    "current_iters",
    "last_ep",
    "epoch_samples",
    "epoch_length",
    "best_score",
    "latest_score",
    "lr",
)


class FolderError(ValueError):
    """A folder that is no exported checkpoint, or a damaged one; the message names the file."""


def is_exported(folder: Path) -> bool:
    """Whether ``folder`` holds an exported checkpoint."""
    return (folder / EXPERT_FILE).is_file()


def write_folder(content: dict, config: dict, card: str, folder: Path) -> None:
    """Write a checkpoint's content, its run's configuration and its model card; the folder appears when it is whole.

    Raises:
        FolderError: ``folder`` exists.
    """
    if folder.exists():
        raise FolderError(f"{folder} exists; remove it or choose another name")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.writing")
    temporary.mkdir(parents=True)
    try:
        _save(content["weights"], temporary / EXPERT_FILE)
        if content.get("vlm_weights"):
            _save(content["vlm_weights"], temporary / VLM_FILE)
        if ema := content.get("ema"):
            shadows = {f"shadow_params.{index:06d}": tensor for index, tensor in enumerate(ema["shadow_params"])}
            numbers = {"decay": str(ema["decay"]), "num_updates": str(ema["num_updates"] or 0)}
            _save(shadows, temporary / EMA_FILE, numbers)
        state = {key: content[key] for key in STATE_KEYS if content.get(key) is not None}
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        for file in temporary.iterdir():
            shutil.copymode(temporary / CONFIG_FILE, file)  # safetensors leaves its files to their owner alone
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_folder(folder: Path) -> dict:
    """A checkpoint's content from a folder, in the layout of the ``.pt``.

    Raises:
        FolderError: a file is missing or damaged.
    """
    content = {**_read_json(folder / STATE_FILE), "weights": _load(folder / EXPERT_FILE)[0], "ema": None}
    if (folder / VLM_FILE).is_file():
        content["vlm_weights"] = _load(folder / VLM_FILE)[0]
    if (folder / EMA_FILE).is_file():
        shadows, numbers = _load(folder / EMA_FILE)
        content["ema"] = {
            "decay": float(numbers["decay"]),
            "num_updates": int(numbers["num_updates"]),
            "shadow_params": [shadows[name] for name in sorted(shadows)],
        }
    return content


def read_folder_config(folder: Path) -> dict:
    """The run's configuration from a folder. Raises :class:`FolderError`."""
    return _read_json(folder / CONFIG_FILE)


def _save(tensors: dict[str, torch.Tensor], path: Path, numbers: dict[str, str] | None = None) -> None:
    # Tensors may be views of one another or of a memory-mapped file; safetensors wants them apart.
    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(apart, path, metadata={"format": "pt", **(numbers or {})})


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not path.is_file():
        raise FolderError(f"{path} is missing; export the checkpoint again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FolderError(f"{path} is not a readable safetensors file ({error}); export the checkpoint again") from None


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read ({error}); export the checkpoint again") from error
    if not isinstance(values, dict):
        raise FolderError(f"{path} holds no JSON object; export the checkpoint again")
    return values
