"""Checkpoints on disk: written whole or not at all, with the room that they need looked at first."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import torch

from data_utils.files import atomic_write
from train_utils.errors import DiskFullError


def save_checkpoint(content: dict, path: Path) -> None:
    """Write ``content`` atomically; it must hold tensors, numbers, strings and containers of them alone.

    Raises:
        DiskFullError: it does not fit on the disk; what was there before is as it was.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            torch.save(content, file)

    needed, free = content_bytes(content), shutil.disk_usage(path.parent).free
    kept = f"{path} is kept as it was" if path.exists() else "nothing was written"
    full = DiskFullError(
        errno.ENOSPC,
        f"the disk is full: {path.name} needs {format_bytes(needed)} and {format_bytes(free)} are free in "
        f"{path.parent}; {kept}; make room, then resume the run",
    )
    if needed > free:
        raise full
    try:
        atomic_write(path, write)
    except (OSError, RuntimeError) as error:
        if _says_disk_full(error):
            raise full from error
        raise


def _says_disk_full(error: BaseException | None) -> bool:
    """torch wraps what the file says."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__context__
    return False


def content_bytes(content: object) -> int:
    """Bytes that the tensors in a checkpoint's content take in a file."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(map(content_bytes, content.values()))
    return sum(map(content_bytes, content)) if isinstance(content, (list, tuple)) else 0


def format_bytes(size: float) -> str:
    """``1.2 GiB``, ``34.5 MiB``"""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
