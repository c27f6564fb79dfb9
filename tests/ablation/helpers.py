"""Studies whose cells cost nothing: numbers that follow from row, seed and key, in the cells' own result files."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

from apt.ablation.evaluation import RESULT_FILE, EvaluationSizes
from apt.ablation.grid import GRIDS, Cell, Iterations, digest, expand, select_rows
from apt.ablation.study import Study
from apt.presets import get_config
from data_utils.files import write_json

SETTINGS = ("SO", "UO", "UC", "UOUE")
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
    return Study(out, chosen, cells, "debug", data, None, evaluation, EvaluationSizes(episodes=10))


def made_up(cell: Cell) -> dict[str, float]:
    """All numbers that the pickplace evaluation gives."""

    def draw(key: str) -> float:
        return (zlib.crc32(f"{cell.name} {key}".encode()) % 11) / 10

    rates = {f"{setting}/{key}": draw(setting + key) for setting in SETTINGS for key in ("success", "named_first")}
    rates |= {f"{setting}/episodes": 10 for setting in SETTINGS}
    names = ("position_cm", "position_ratio", "language_cm", "language_ratio")
    return {**{name: 3 * draw(name) for name in names}, **rates}


def finish(study: Study, cell: Cell, values: dict[str, float] | None = None) -> None:
    """The cell's result, as its evaluation would have written it."""
    folder = study.cell_folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    values = made_up(cell) if values is None else values
    write_json(folder / RESULT_FILE, {"settings": digest(study.settings(cell)), "values": values, "seconds": 1.0})
