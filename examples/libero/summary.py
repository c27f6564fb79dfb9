"""The tables of an evaluation: suites and models side by side, with how sure each rate is.

    python -m examples.libero.summary results/libero results/libero-pro [--out summary]

Prints the tables; with ``--out``, also writes them as summary.md, summary.csv and summary.png.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from data_utils.cli import CommandLineError, parse
from data_utils.files import write_text
from examples.errors import SimulatorError
from examples.libero.benchmarks import BENCHMARKS
from examples.libero.results import ResultsError
from examples.libero.summary_tables import SuiteRun, Table, benchmark_title, percent, read_runs, tables
from examples.libero.tasks import read_difficulties

SHARED_SETTINGS = ("max_steps", "execute_steps", "seed", "assets", "versions")  # rates differ by these


@dataclass(frozen=True)
class Arguments:
    results: tyro.conf.Positional[tuple[Path, ...]]
    """Result files of examples.libero.evaluate, or folders of them."""
    out: Path | None = None
    """Folder for summary.md, summary.csv and summary.png."""
    classification: Path | None = None
    """LIBERO-plus's task_classification.json, for its levels of difficulty; the categories need no file."""


# -- what is written ------------------------------------------------------------------------------------------------


def markdown(made: Iterable[Table], notes: Sequence[str]) -> str:
    """The tables with a line per model and their intervals, and the notes below."""
    parts = ["Success in %, with Wilson's 95% interval."]
    for table in made:
        lines = [f"### {table.title}", "", "| model | " + " | ".join(table.columns) + " |"]
        lines.append("|---" * (len(table.columns) + 1) + "|")
        for model, cells in table.rows.items():
            texts = [percent(cells[column]) if column in cells else "" for column in table.columns]
            lines.append(f"| {model} | " + " | ".join(texts) + " |")
        parts.append("\n".join(lines))
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def terminal(made: Iterable[Table], notes: Sequence[str]) -> str:
    """The tables the other way round, a line per column, which fits a terminal whatever the number of suites."""
    parts = []
    for table in made:
        columns = [column for column in table.columns if any(column in cells for cells in table.rows.values())]
        width = max(len(name) for name in [table.title, *columns])
        models = list(table.rows)
        widths = [max(len(model), 19) for model in models]
        lines = [
            f"{table.title:{width}}" + "".join(f"  {m:>{w}}  {'n':>5}" for m, w in zip(models, widths, strict=True))
        ]
        for column in columns:
            line = f"{column:{width}}"
            for model, wide in zip(models, widths, strict=True):
                cell = table.rows[model].get(column)
                line += f"  {percent(cell) if cell else '':>{wide}}  {cell.episodes if cell else '':>5}"
            lines.append(line)
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts) + "\n"


def write_csv(path: Path, made: Iterable[Table]) -> None:
    """A line per table, model and column; rates are fractions."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "model", "column", "episodes", "rate", "low", "high"])
        for table in made:
            for model, cells in table.rows.items():
                for column in table.columns:
                    if (cell := cells.get(column)) is not None:
                        numbers = (f"{value:.6f}" for value in (cell.rate, *cell.interval))
                        writer.writerow([table.title, model, column, cell.episodes, *numbers])


def remarks(runs: Sequence[SuiteRun]) -> list[str]:
    """What a reader of the tables must know: settings that differ, partial results, tasks left out, other assets."""
    notes = []
    for benchmark in BENCHMARKS:
        of_benchmark = [run for run in runs if run.benchmark == benchmark]
        for name in SHARED_SETTINGS:
            values: dict[str, set[str]] = defaultdict(set)
            for run in of_benchmark:
                values[str(run.settings.get(name))].add(
                    run.model if name != "max_steps" else f"{run.model} {run.suite}"
                )
            if len(values) > 1:
                told = "; ".join(f"{value} ({', '.join(sorted(of))})" for value, of in sorted(values.items()))
                notes.append(f"{benchmark_title(benchmark)}: {name} differs: {told}")
    labels = sorted({str(run.settings.get("assets")) for run in runs} - {"LIBERO"})
    if labels:
        notes.append(f"meshes and textures are not LIBERO's own: {', '.join(labels)}")
    for run in runs:
        if run.missing:
            notes.append(f"{run.model}, {benchmark_title(run.benchmark)} {run.suite}: partial, {run.missing}")
        if run.skipped:
            notes.append(f"{run.model}, {run.suite}: {run.skipped} tasks that cannot be run are left out")
    return notes


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 where there is nothing to sum up."""
    try:
        arguments = parse(Arguments, argv, "python -m examples.libero.summary", __doc__)
        runs = read_runs(arguments.results)
        difficulties = None if arguments.classification is None else read_difficulties(arguments.classification)
        made, notes = tables(runs, difficulties), remarks(runs)
        print(terminal(made, notes), end="")
        if arguments.out is not None:
            from examples.libero.summary_plot import plot  # needs matplotlib

            arguments.out.mkdir(parents=True, exist_ok=True)
            write_text(arguments.out / "summary.md", markdown(made, notes))
            write_csv(arguments.out / "summary.csv", made)
            plot(made, arguments.out / "summary.png")
            print(f"written: {arguments.out}/summary.md, summary.csv, summary.png")
    except (CommandLineError, ResultsError, SimulatorError, OSError) as error:
        print(f"python -m examples.libero.summary: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
