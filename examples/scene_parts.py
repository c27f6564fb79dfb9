"""Labelled scenes, rendered part by part (``apt.grounding.scenes``) by several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from apt.grounding.scenes import PART
from data_utils.cli import bar

PER_PART = 250
SCENES_STREAM = 3  # last number of every seed here


def render_parts(out: Path, scenes: int, workers: int, render_part: Callable[[int], object]) -> None:
    """Make the parts that are missing of so many scenes, whole parts; stopped, the same call goes on.

    Args:
        workers: processes, each with whatever simulator ``render_part`` makes there.
        render_part: makes the part of a number; can be pickled.
    """
    count = -(-scenes // PER_PART)
    missing = [number for number in range(count) if not (out / PART.format(number)).is_dir()]
    context = multiprocessing.get_context("spawn")  # an OpenGL context does not survive a fork
    with (
        ProcessPoolExecutor(min(workers, max(1, len(missing))), context, initializer=_start) as pool,
        bar(total=count * PER_PART, initial=(count - len(missing)) * PER_PART, unit="scene") as progress,
    ):
        for done in as_completed([pool.submit(render_part, number) for number in missing]):
            done.result()
            progress.update(PER_PART)


def _start() -> None:
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's rasteriser: one process per core does better than threads
