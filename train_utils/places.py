"""Where runs are kept unless a flag says otherwise, and found by their names."""

from __future__ import annotations

from pathlib import Path

CKPT_DIR = "./checkpoints/APT"
LOG_DIR = "./logs/APT"
LATEST = "ckpt_latest.pt"


def named_checkpoint(name_or_path: str | Path) -> Path:
    """A path as it is; the name of a run under :data:`CKPT_DIR` to that run's newest checkpoint."""
    path = Path(name_or_path)
    run = Path(CKPT_DIR) / path / LATEST
    return run if not path.exists() and not path.suffix and run.is_file() else path
