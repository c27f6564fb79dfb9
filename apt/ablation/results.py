"""What a finished cell came to: one small file that says all of it, to be kept, committed or brought from elsewhere.

``<results>/<grid>/<row>/seed<N>.json`` holds the settings that its numbers depend on, the numbers, the outcome of every
episode, training curves, versions and the commit. Tables, charts and pages are made from these files alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_utils.files import read_json, write_json

REPOSITORY = Path(__file__).resolve().parents[2]
VERSIONS_OF = ("torch", "transformers", "diffusers", "numpy", "mujoco")
CURVES = ("loss/total", "eval/position_cm")
MOST_POINTS = 60  # of a curve

Value = float | list[int]
"""A number, or the outcomes of trials, each 0 or 1, in the trials' order."""


@dataclass(frozen=True)
class CellResult:
    """
    Args:
        preset: name of the configuration that the cell's differs from.
        settings: what the values depend on (:meth:`apt.ablation.study.Study.settings`).
        values: by name of the measure, or ``SETTING/MEASURE``.
        curves: (steps, values) by what was logged.
        seconds: that judging took.
    """

    grid: str
    row: str
    seed: int
    preset: str
    settings: Mapping[str, Any]
    values: Mapping[str, Value]
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    versions: Mapping[str, str]
    commit: str | None
    seconds: float

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> CellResult:
        """Raises ``ValueError`` for a file that is none."""
        try:
            return cls(**read_json(path))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no cell's result ({error}); remove it to run the cell anew") from error


def result_path(results: Path, grid: str, row: str, seed: int) -> Path:
    return results / grid / row / f"seed{seed}.json"


def check_values(values: Mapping[str, Value], evaluation: str) -> None:
    """Raises ``ValueError`` for what is neither a finite number nor a list of outcomes."""
    for key, value in values.items():
        if isinstance(value, list):
            if not value or any(outcome not in (0, 1) for outcome in value):
                raise ValueError(f"evaluation {evaluation} gave {key} = {value!r}; wanted outcomes, each 0 or 1")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"evaluation {evaluation} gave {key} = {value!r}; wanted a finite number, or outcomes")


def number(value: Value) -> float:
    """The number, or the share of trials that succeeded."""
    return math.fsum(value) / len(value) if isinstance(value, list) else value


def read_curve(table: Path, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a number of a run's ``metrics.jsonl``; of a step that was done again, the last."""
    rows = (json.loads(line) for line in table.read_text(encoding="utf-8").splitlines())
    values = {row["step"]: row[tag] for row in rows if tag in row}
    return np.array(sorted(values), int), np.array([values[step] for step in sorted(values)])


def read_curves(table: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Those of ``CURVES`` that a run logged, thinned out where they are long."""
    if not table.is_file():
        return {}
    found = {}
    for tag in CURVES:
        steps, values = read_curve(table, tag)
        every = -(-len(steps) // MOST_POINTS)
        if len(steps):
            keep = np.arange(len(steps) - 1, -1, -every)[::-1]  # the last one always
            found[tag] = steps[keep].tolist(), [round(float(value), 5) for value in values[keep]]
    return found


def versions() -> dict[str, str]:
    """Of what results depend on and is installed."""
    found = {}
    for name in VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit(repository: Path) -> str | None:
    """Of a checkout, with ``+`` behind it where files that git knows have changed since; None: it is none."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
