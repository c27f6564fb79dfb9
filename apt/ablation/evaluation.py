"""How a trained cell is judged: a hook that turns a checkpoint into numbers, in a process of its own.

python -m apt.ablation.evaluation CELL_FOLDER --device cpu
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from apt.ablation.results import (
    REPOSITORY,
    CellResult,
    Value,
    check_values,
    commit,
    read_curves,
    result_path,
    versions,
)
from data_utils.files import read_json

SETTINGS_FILE, EVALUATION_FOLDER = "settings.json", "evaluation"


@dataclass(frozen=True)
class EvaluationSizes:
    """How thoroughly a cell is judged."""

    episodes: int
    """Closed-loop episodes per setting."""
    max_steps: int = 120
    """Control steps after which an episode counts as failed."""
    execute_steps: int = 8
    """Control steps between two queries of the policy."""
    ensemble: int = 0
    """Queries that a trajectory is averaged over; 0: the newest alone."""
    denoising_steps: int | None = None
    """None: the planner's default."""
    noise_seeds: int = 8
    """Draws of the noise that language sensitivity is measured over."""
    every: int = 8
    """Frames between two open-loop queries."""
    image_size: int = 256
    """Of the simulator's cameras, recording included."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low = {"ensemble": 0, "noise_seeds": 2}.get(field.name, 1)
            if value is not None and value < low:
                raise ValueError(f"--eval-{field.name.replace('_', '-')} is {value}; wanted at least {low}")


@dataclass(frozen=True)
class EvaluationRequest:
    """What an evaluation is given."""

    checkpoint: Path
    """``ckpt_latest.pt`` with its configuration beside it."""
    config: dict[str, Any]
    """Fields of the TrainConfig it was trained with, those that change what is learned."""
    seed: int
    folder: Path
    """For its files; what an evaluation that was killed had left there is still there."""
    demos: Path | None
    """Recorded data, with the folders ``train`` and ``test``; None: those of the user's own data locations."""
    sizes: EvaluationSizes
    device: str


class Evaluation(Protocol):
    """Judges a policy.

    A number's key is the name of a measure, or ``SETTING/MEASURE``: the table and the chart have a column per setting.
    A rate is given as the outcomes of its trials, each 0 or 1; where rows have the same trials in the same order, their
    difference is judged trial by trial.
    """

    def __call__(self, request: EvaluationRequest) -> dict[str, Value]: ...


EVALUATIONS = {
    "pickplace": "examples.pickplace.ablation:evaluate_policy",
    "open_loop": "examples.pickplace.ablation:evaluate_open_loop",
    "blocks": "examples.blocks.ablation:evaluate_policy",
    "blocks_open_loop": "examples.blocks.ablation:evaluate_open_loop",
}


def load_evaluation(name: str) -> Evaluation:
    """A registered evaluation, or ``module:function``. Raises ``ValueError``."""
    location = EVALUATIONS.get(name, name)
    module, _, function = location.partition(":")
    if not module or not function:
        raise ValueError(f"--evaluation is {name!r}; wanted {', '.join(EVALUATIONS)}, or module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--evaluation {name}: {error}") from error
    if not callable(found):
        raise ValueError(f"--evaluation {name}: {function} is a {type(found).__name__}; wanted a function")
    return found


def evaluate_cell(cell: Path, device: str) -> CellResult:
    """Judges the cell as its settings say and writes its result. Raises ``ValueError`` for what is no number."""
    began = time.monotonic()
    kept = read_json(cell / SETTINGS_FILE)
    place, settings = kept.pop("place"), kept
    train, evaluation = settings["learned"]["train"], settings["evaluation"]
    request = EvaluationRequest(
        checkpoint=cell / place["checkpoint"],
        config=train,
        seed=train["seed"],
        folder=cell / EVALUATION_FOLDER,
        demos=None if place["demos"] is None else Path(place["demos"]),
        sizes=EvaluationSizes(**evaluation["sizes"]),
        device=device,
    )
    request.folder.mkdir(parents=True, exist_ok=True)
    values = load_evaluation(evaluation["name"])(request)
    check_values(values, evaluation["name"])
    result = CellResult(
        grid=place["grid"],
        row=place["row"],
        seed=train["seed"],
        preset=place["preset"],
        settings=settings,
        values=values,
        curves=read_curves(cell / place["metrics"]),
        versions=versions(),
        commit=commit(REPOSITORY),
        seconds=round(time.monotonic() - began, 1),
    )
    result.write(result_path(Path(place["results"]), result.grid, result.row, result.seed))
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", type=Path, help="a cell's folder, with its settings.json and checkpoint")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    print(json.dumps(evaluate_cell(args.cell, args.device).values, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
