"""The tables of an evaluation: suites and models side by side, with how sure each rate is.

    python -m examples.libero.summary results/libero results/libero-pro [--out summary]

Prints the tables; with ``--out``, also writes them as summary.md, summary.csv and summary.png.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from data_utils.cli import CommandLineError, parse
from examples.errors import SimulatorError
from examples.libero.benchmarks import BENCHMARKS, CATEGORIES, LIBERO_SUITES, perturbation
from examples.libero.results import ResultsError, Row, read_results, result_files
from examples.libero.tasks import read_difficulties
from examples.statistics import wilson_interval

SUITE_TITLES = dict(zip(LIBERO_SUITES, ("Spatial", "Object", "Goal", "Long"), strict=True))
CHANGE_TITLES = {"swap": "Pos", "task": "Task", "lan": "Language", "object": "Object"}  # LIBERO-PRO's, as in the paper
MEAN = "Mean"
SHARED_SETTINGS = ("max_steps", "execute_steps", "seed", "assets", "versions")  # rates differ by these


@dataclass(frozen=True)
class Arguments:
    results: tyro.conf.Positional[tuple[Path, ...]]
    """Result files of examples.libero.evaluate, or folders of them."""
    out: Path | None = None
    """Folder for summary.md, summary.csv and summary.png."""
    classification: Path | None = None
    """LIBERO-plus's task_classification.json, for its levels of difficulty; the categories need no file."""


@dataclass(frozen=True)
class SuiteRun:
    """One results file."""

    file: Path
    model: str
    benchmark: str
    suite: str
    settings: dict[str, Any]
    skipped: int
    """Tasks that could not be run, as their package ships them."""
    outcomes: tuple[tuple[str, bool], ...]
    """Task's name and success of every episode."""
    missing: str = ""
    """How much of the suite there is, in words, where that is not all of it."""


@dataclass(frozen=True)
class Cell:
    """A success rate: of episodes, or the mean of several such rates."""

    rate: float
    episodes: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95%, as fractions."""
        return wilson_interval(self.rate * self.episodes, self.episodes)


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: dict[str, dict[str, Cell]] = field(default_factory=dict)
    """Model -> column -> cell; a column without episodes is left out."""


def read_runs(paths: Sequence[Path]) -> list[SuiteRun]:
    """Raises ``ResultsError`` where there are none, one is damaged, or two are of the same model and suite."""
    found: dict[tuple[str, str, str], list[SuiteRun]] = defaultdict(list)
    for file in result_files(list(paths)):
        rows, record = read_results(file)
        settings = record["settings"]
        names = {episode["task_id"]: episode.get("task", "") for episode in record.get("episodes", ())}
        run = SuiteRun(
            file,
            str(record.get("model", file.stem)),
            str(settings.get("benchmark")),
            str(settings.get("suite")),
            settings,
            len(record.get("skipped_tasks", ())),
            tuple((names.get(row.task_id, ""), row.success) for row in rows.values()),
            _missing(rows, record),
        )
        if run.benchmark not in BENCHMARKS:
            raise ResultsError(f"{file.with_suffix('.json')}: is of benchmark {run.benchmark!r}, which is not known")
        found[run.benchmark, run.suite, run.model].append(run)
    if not found:
        raise ResultsError(f"no results in {', '.join(map(str, paths))}; name files or folders of the evaluator's")
    for runs in found.values():
        if len(runs) > 1:
            files = " and ".join(str(run.file) for run in runs)
            raise ResultsError(f"{files} are of the same model and suite; give one, or another --model_name to each")
    return [runs[0] for runs in found.values()]


def _missing(rows: Mapping[tuple[int, int], Row], record: Mapping[str, Any]) -> str:
    """Tasks that cannot be run are no part of the whole: they are remarked by themselves."""
    if not (whole := record.get("whole_suite")):
        return ""  # other programs' results do not tell
    tasks = whole["tasks"] - len(record.get("skipped_tasks", ()))
    done = len({task for task, _ in rows})
    if len(rows) >= tasks * whole["episodes"]:
        return ""
    return f"{done} of {tasks} tasks, {len(rows)} of {tasks * whole['episodes']} episodes"


def tables(runs: Sequence[SuiteRun], difficulties: dict[tuple[str, str], int | None] | None = None) -> list[Table]:
    """A table of suites per benchmark; of LIBERO-plus also by category, and with ``difficulties`` by level."""
    made = []
    for benchmark in BENCHMARKS.values():
        of_benchmark = [run for run in runs if run.benchmark == benchmark.name]
        if not of_benchmark:
            continue
        made.append(_suite_table(benchmark.name, benchmark.suites, of_benchmark))
        if benchmark.name != "libero-plus":
            continue
        made.append(_grouped("LIBERO-plus, by what was changed", CATEGORIES, of_benchmark, _category))
        if difficulties is not None:
            levels = [f"Level {level}" for level in sorted({level for level in difficulties.values() if level})]

            def level_of(run: SuiteRun, task: str) -> str:
                return f"Level {difficulties.get((run.suite, task))}"

            made.append(_grouped("LIBERO-plus, by difficulty", levels, of_benchmark, level_of))
    return made


def _suite_table(benchmark: str, reported: Sequence[str], runs: Sequence[SuiteRun]) -> Table:
    present = {run.suite for run in runs}
    suites = [*reported, *sorted(present - set(reported))]
    changes = sorted({_parts(suite)[1] for suite in reported}, key=list(CHANGE_TITLES).index) if _pro(reported) else []
    means = [f"{MEAN} {CHANGE_TITLES[change]}" for change in changes] + [MEAN]
    table = Table(_title(benchmark), [_column(suite) for suite in suites] + means)
    for run in runs:
        cells = table.rows.setdefault(run.model, {})
        if run.outcomes:
            cells[_column(run.suite)] = _cell(run.outcomes)
    for cells in table.rows.values():
        for change in changes:
            of_change = [_column(suite) for suite in reported if _parts(suite)[1] == change]
            _add_mean(cells, f"{MEAN} {CHANGE_TITLES[change]}", of_change)
        _add_mean(cells, MEAN, [_column(suite) for suite in reported])
    return table


def _grouped(
    title: str, columns: Sequence[str], runs: Sequence[SuiteRun], group: Callable[[SuiteRun, str], str]
) -> Table:
    """Episodes of all suites together, by ``group`` of their task."""
    outcomes: dict[str, dict[str, list[tuple[str, bool]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for task, success in run.outcomes:
            outcomes[run.model][group(run, task)].append((task, success))
    table = Table(title, list(columns))
    for model, groups in outcomes.items():
        table.rows[model] = {column: _cell(groups[column]) for column in columns if column in groups}
    return table


def _category(run: SuiteRun, task: str) -> str:
    found = perturbation(task)
    return found.category if found is not None else ""


def _cell(outcomes: Sequence[tuple[str, bool]]) -> Cell:
    return Cell(sum(success for _, success in outcomes) / len(outcomes), len(outcomes))


def _add_mean(cells: dict[str, Cell], name: str, columns: list[str]) -> None:
    """Of suites, each counting the same, as the papers have it; left out where a suite is missing."""
    if all(column in cells for column in columns):
        of = [cells[column] for column in columns]
        cells[name] = Cell(sum(cell.rate for cell in of) / len(of), sum(cell.episodes for cell in of))


def _title(benchmark: str) -> str:
    return {"libero": "LIBERO", "libero-pro": "LIBERO-PRO", "libero-plus": "LIBERO-plus"}[benchmark]


def _pro(suites: Sequence[str]) -> bool:
    return all(_parts(suite)[1] for suite in suites)


def _parts(suite: str) -> tuple[str, str]:
    """The unchanged suite and LIBERO-PRO's change, empty where there is none."""
    base, _, change = suite.rpartition("_")
    return (base, change) if base in SUITE_TITLES and change in CHANGE_TITLES else (suite, "")


def _column(suite: str) -> str:
    base, change = _parts(suite)
    title = SUITE_TITLES.get(base, base)
    return f"{title} {CHANGE_TITLES[change]}" if change else title


# -- what is written ------------------------------------------------------------------------------------------------


def percent(cell: Cell) -> str:
    low, high = cell.interval
    return f"{100 * cell.rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


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
                notes.append(f"{_title(benchmark)}: {name} differs: {told}")
    labels = sorted({str(run.settings.get("assets")) for run in runs} - {"LIBERO"})
    if labels:
        notes.append(f"meshes and textures are not LIBERO's own: {', '.join(labels)}")
    for run in runs:
        if run.missing:
            notes.append(f"{run.model}, {_title(run.benchmark)} {run.suite}: partial, {run.missing}")
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
            (arguments.out / "summary.md").write_text(markdown(made, notes), encoding="utf-8")
            write_csv(arguments.out / "summary.csv", made)
            plot(made, arguments.out / "summary.png")
            print(f"written: {arguments.out}/summary.md, summary.csv, summary.png")
    except (CommandLineError, ResultsError, SimulatorError, OSError) as error:
        print(f"python -m examples.libero.summary: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
