"""On which machine a benchmark ran, and its table as a file."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> str:
    """The GPU's name, or the CPU's kind and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def save_table(script: str, title: str, device: torch.device, arguments: list[str], lines: list[str]) -> None:
    """Write ``results/<date>_<machine>_<script>.md``, and say where it is.

    Args:
        script: name of the benchmark without its ending.
        arguments: of its command line.
        lines: Markdown.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")
    file = RESULTS / f"{datetime.date.today()}_{slug}_{script}.md"
    file.parent.mkdir(exist_ok=True)
    command = f"    python benchmarks/{script}.py {' '.join(arguments)}".rstrip()
    file.write_text("\n".join([f"# {title}", "", command, "", *lines]) + "\n", encoding="utf-8")
    print(f"saved to {os.path.relpath(file)}")
