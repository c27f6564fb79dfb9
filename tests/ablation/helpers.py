"""Studies whose cells cost nothing: numbers that follow from row, seed and key, in the cells' own result files."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

from apt.ablation.evaluation import EvaluationSizes
from apt.ablation.grid import GRIDS, Cell, Iterations, expand, select_rows
from apt.ablation.results import CellResult, Value
from apt.ablation.study import Study
from apt.presets import get_config

SETTINGS = ("SO", "UO", "UC", "UOUE")
EPISODES = 10
ITERATIONS = Iterations(va=2, vla=3, one_stage=4)


def make_study(
    out: Path,
    grid: str = "table2",
    seeds: int = 2,
    data: dict | None = None,
    evaluation: str = "open_loop",
    rows: list[str] | None = None,
    **fields,
) -> Study:
    """A study of the debug preset with ``fields`` changed; nothing is written."""
    chosen = select_rows(GRIDS[grid], rows)
    cells = expand(chosen, dataclasses.replace(get_config("debug"), **fields), seeds, ITERATIONS)
    data = {"episodes": 6, "test_episodes": 2} if data is None else data
    sizes = EvaluationSizes(episodes=EPISODES)
    return Study(out, chosen, cells, "debug", data, None, evaluation, sizes, out / "results")


def made_up(cell: Cell) -> dict[str, Value]:
    """All that the pickplace evaluation gives."""

    def draw(key: str) -> int:
        return zlib.crc32(f"{cell.name} {key}".encode()) % (EPISODES + 1)

    def outcomes(key: str) -> list[int]:
        return [int(episode < draw(key)) for episode in range(EPISODES)]

    rates = {f"{setting}/{key}": outcomes(setting + key) for setting in SETTINGS for key in ("success", "named_first")}
    names = ("position_cm", "position_ratio", "language_cm", "language_ratio")
    return {**{name: 0.3 * draw(name) for name in names}, **rates}


def finish(study: Study, cell: Cell, values: dict[str, Value] | None = None, curves: dict | None = None) -> None:
    """The cell's result, as its evaluation would have written it."""
    values = made_up(cell) if values is None else values
    result = CellResult(
        grid=study.grid.name,
        row=cell.row.name,
        seed=cell.seed,
        preset=study.preset,
        settings=study.settings(cell),
        values=values,
        curves=curves or {},
        versions={},
        commit=None,
        seconds=1.0,
    )
    result.write(study.result_path(cell))
