"""Success rates of results files, as tables: a row per model, a column per suite or kind of change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.libero.benchmarks import BENCHMARKS, CATEGORIES, LIBERO_SUITES, perturbation
from examples.libero.results import ResultsError, Row, read_results, result_files
from examples.statistics import wilson_interval

SUITE_TITLES = dict(zip(LIBERO_SUITES, ("Spatial", "Object", "Goal", "Long"), strict=True))
CHANGE_TITLES = {"swap": "Pos", "task": "Task", "lan": "Language", "object": "Object"}  # LIBERO-PRO's, as in the paper
MEAN = "Mean"


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
    table = Table(benchmark_title(benchmark), [_column(suite) for suite in suites] + means)
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


def benchmark_title(benchmark: str) -> str:
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


def percent(cell: Cell) -> str:
    low, high = cell.interval
    return f"{100 * cell.rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
