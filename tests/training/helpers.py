"""Short training runs, in this process or another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt.train import main

REPOSITORY = Path(__file__).parents[2]


def flags(folder: Path, name: str, **fields) -> list[str]:
    """Command line of a debug run under ``folder``."""
    values = {
        "name": name,
        "ckpt_dir": folder / "ckpt",
        "log_dir": folder / "log",
        "bs": 2,
        "sample_multiplex": 3,
        "image_size": 64,
        "vis_interval": 0,
        "device": "cpu",
        **fields,
    }
    arguments = ["--config", "debug"]
    for field, value in values.items():
        arguments += [f"--{field}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return arguments


def train(folder: Path, name: str, **fields) -> int:
    return main(flags(folder, name, **fields))


def short_run(folder: Path, data_loc: Path) -> Path:
    """``ckpt_latest.pt`` of a run of two steps with an average and a tuned VLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_DATA_LOC", str(data_loc))
        assert train(folder, "run", vlm_finetune_mode="lora", ema_enabled=True, ema_start=0, max_iterations=2) == 0
    return folder / "ckpt" / "run" / "ckpt_latest.pt"


def start_training(folder: Path, name: str, data_loc: Path, processes: int = 1, **fields) -> subprocess.Popen:
    """A real training process (torchrun for several), output captured as text."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "train_utils.ranks", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "apt.train", *flags(folder, name, **fields)]
    environment = {**os.environ, "APT_DATA_LOC": str(data_loc), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def losses(folder: Path, name: str) -> dict[int, float]:
    """Logged loss by iteration."""
    lines = (folder / "log" / name / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss/total"] for row in map(json.loads, lines)}
