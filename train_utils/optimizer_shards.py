"""A sharded optimizer's state in files: ``ckpt_latest_opt_rank<r>.pt`` beside ``ckpt_latest.pt``, one per process.

Several files cannot be renamed at once, so a save has three acts: every rank writes its shard under a pending name, the
main rank replaces the checkpoint, every rank gives its shard the final name. Each save has an identity that the
checkpoint and all of its shards carry; whichever of the two names holds the checkpoint's identity is the one that
counts, so a kill between any two acts loses nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from train_utils.optim import check_moments
from train_utils.saving import save_checkpoint


def shard_path(latest: Path, rank: int) -> Path:
    return latest.with_name(f"{latest.stem}_opt_rank{rank}.pt")


def _pending_path(latest: Path, rank: int) -> Path:
    return latest.with_name(f".{shard_path(latest, rank).name}.pending")


def write_pending(latest: Path, rank: int, identity: str, state: dict) -> None:
    """First act. ``state`` holds tensors, numbers, strings and containers of them alone."""
    latest.parent.mkdir(parents=True, exist_ok=True)
    content = {"identity": identity, **state}
    save_checkpoint(content, _pending_path(latest, rank))


def discard_pending(latest: Path, rank: int) -> None:
    """Instead of the third act, where the checkpoint was not replaced."""
    _pending_path(latest, rank).unlink(missing_ok=True)


def finish(latest: Path, rank: int) -> None:
    """Third act."""
    os.replace(_pending_path(latest, rank), shard_path(latest, rank))


def remove_beyond(latest: Path, world_size: int) -> None:
    """Delete what an earlier save by more processes left behind."""
    for path in latest.parent.glob(f"{latest.stem}_opt_rank*.pt"):
        if int(path.stem.rpartition("rank")[2]) >= world_size:
            path.unlink(missing_ok=True)


def read_shard(latest: Path, rank: int, identity: str) -> dict:
    """The state that belongs to the checkpoint of this identity; completes a save that was interrupted.

    Raises:
        ValueError: there is none.
    """
    if _identity(_pending_path(latest, rank)) == identity:
        finish(latest, rank)
    discard_pending(latest, rank)
    path = shard_path(latest, rank)
    found = _identity(path)
    if found is None:
        raise ValueError(
            f"its optimizer shard {path} is missing, damaged, or holds more than data, which is not loaded"
        )
    if found != identity:
        raise ValueError(f"the optimizer shard {path} belongs to another save than {latest.name}")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_partitions(state: dict, masters: list[torch.Tensor]) -> None:
    """Raise ``ValueError`` unless a shard's moments and master weights are those of these flat partitions."""
    moments, finer = state.get("moments"), state.get("masters")
    if not isinstance(moments, dict) or not isinstance(finer, dict) or not {*moments, *finer} <= {*range(len(masters))}:
        raise ValueError("its optimizer shards are malformed: wanted moments and masters by the number of a partition")
    for index, entry in moments.items():
        check_moments(entry, masters[index], index)
    for index, weights in finer.items():
        if not isinstance(weights, torch.Tensor) or weights.shape != masters[index].shape:
            raise ValueError(f"its optimizer shards hold no weights of partition {index}'s shape")


def _identity(path: Path) -> str | None:
    """The identity of the save that a file belongs to; None for a file that is not there or not readable."""
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises many kinds for damaged files; all of them mean that the file is of no use
        return None
    return content.get("identity") if isinstance(content, dict) else None
