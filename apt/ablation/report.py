"""The table of a grid, from its cells' results alone: means over seeds, gains of two stages, with their intervals."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apt.ablation.grid import GRIDS, Grid, Row, digest, select_rows
from apt.ablation.results import CellResult, Value, number
from apt.ablation.study import Study
from data_utils.files import write_text

CHECK, MISSING = "✓", "–"
CSV_FILE, MARKDOWN_FILE = "table.csv", "table.md"
RESAMPLES, RESAMPLING_SEED = 10_000, 0


@dataclass(frozen=True)
class Measure:
    """How a number is shown.

    Args:
        title: with its unit.
        scale: what it is multiplied by; digits: after the point.
        is_rate: it is a share of trials, in [0, 1].
    """

    title: str
    scale: float = 1.0
    digits: int = 2
    is_rate: bool = False


MEASURES = {
    "success": Measure("closed-loop success (%)", 100, 0, is_rate=True),
    "named_first": Measure("named object approached first (%)", 100, 0, is_rate=True),
    "wrong_first": Measure("another object approached first (%)", 100, 0, is_rate=True),
    "right_tray": Measure("named object ends in the named tray (%)", 100, 0, is_rate=True),
    "position_cm": Measure("open-loop position error (cm, less is better)"),
    "position_ratio": Measure("position error / mean motion's (less is better)"),
    "language_cm": Measure("path change, instruction swapped (cm)"),
    "language_ratio": Measure("path change / spread between noise seeds", digits=3),
    "place_known": Measure("place of the named thing known by the VLM's layer (%)", 100, 0),
    "told_apart": Measure("named thing told apart from others of its kind by the VLM's layer (%)", 100, 0),
    "let_through": Measure("let through by the gate of the layer (%)", 100, 0),
}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its 95% interval where there is one; both as shown, that is scaled."""

    mean: float
    low: float | None
    high: float | None
    method: str
    """t: over seeds; wilson: over the pooled episodes; bootstrap: over seeds and the episodes that two rows share;
    none: of a single number."""


@dataclass(frozen=True)
class Line:
    """A row of the grid as measured.

    Args:
        estimates: by key; values: of the seeds that are done, by key, scaled as the estimates.
        seeds: how many are done, of how many.
        failed: last words of cells that failed, by seed.
    """

    row: Row
    estimates: Mapping[str, Estimate]
    values: Mapping[str, list[float]]
    seeds: tuple[int, int]
    failed: Mapping[int, str]


@dataclass(frozen=True)
class Gain:
    """Of a 2-stage row over a 1-stage row that it is compared with, by key, seed by seed."""

    title: str
    row: Row
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True)
class Report:
    """
    Args:
        settings: a cell's of each row (:meth:`Study.settings`), by the row's name.
        results: of the cells that are done, by row's name and seed.
        trials: numbers of episodes that rates are of, per setting and seed.
    """

    grid: Grid
    preset: str
    settings: Mapping[str, Mapping[str, Any]]
    results: Mapping[tuple[str, int], CellResult]
    lines: list[Line]
    keys: list[str]
    trials: list[int]
    gains: list[Gain]

    def gain_of(self, family: str) -> Gain | None:
        """Of a family that was run with one stage and with two."""
        return next((gain for gain in self.gains if gain.title == gain.row.family == family), None)


def measure_of(key: str) -> Measure:
    name = key.rpartition("/")[2]
    return MEASURES.get(name, Measure(name.replace("_", " ")))


def build_report(study: Study) -> Report:
    """From the results that are there. Raises ``StudyError`` for results of other settings."""
    results = {(cell.row.name, cell.seed): study.result(cell) for cell in study.cells}
    done = {place: result for place, result in results.items() if result is not None}
    failed = {(cell.row.name, cell.seed): study.failure(cell) for cell in study.cells}
    settings = {cell.row.name: study.settings(cell) for cell in study.cells}
    seeds = len({cell.seed for cell in study.cells})
    return _report(study.grid, study.preset, settings, done, failed, seeds)


def report_of_results(folder: Path) -> Report:
    """Of the result files of a grid alone: ``folder`` holds ``ROW/seedN.json``. Raises ``ValueError`` where there are
    none, or of several grids, presets, data or evaluations."""
    found = [CellResult.read(path) for path in sorted(folder.glob("*/seed*.json"))]
    kinds = {
        digest({"grid": r.grid, "preset": r.preset, "data": r.settings["learned"]["data"], **r.settings["evaluation"]})
        for r in found
    }
    if len(kinds) != 1:
        raise ValueError(
            f"{folder} holds {len(found)} results, as ROW/seedN.json, of {len(kinds)} kinds; wanted those of one grid, "
            "preset, data and evaluation"
        )
    done = {(result.row, result.seed): result for result in found}
    grid = select_rows(GRIDS[found[0].grid], list(dict.fromkeys(row for row, _ in done)))
    settings = {result.row: result.settings for result in found}
    return _report(grid, found[0].preset, settings, done, {}, len({seed for _, seed in done}))


def _report(
    grid: Grid,
    preset: str,
    settings: Mapping[str, Mapping[str, Any]],
    done: Mapping[tuple[str, int], CellResult],
    failures: Mapping[tuple[str, int], str | None],
    seeds: int,
) -> Report:
    keys = list(dict.fromkeys(key for result in done.values() for key in result.values))
    lines = []
    for row in grid.rows:
        found = [result.values for (name, _), result in sorted(done.items()) if name == row.name]
        by_key = {key: [values[key] for values in found if key in values] for key in keys}
        estimates = {key: estimate(key, given) for key, given in by_key.items() if given}
        values = {key: [measure_of(key).scale * number(value) for value in by_key[key]] for key in estimates}
        failed = {
            seed: words
            for (name, seed), words in failures.items()
            if name == row.name and words is not None and (name, seed) not in done
        }
        lines.append(Line(row, estimates, values, (len(found), seeds), failed))
    trials = {len(value) for result in done.values() for value in result.values.values() if isinstance(value, list)}
    return Report(grid, preset, settings, done, lines, keys, sorted(trials), _gains(grid, done, keys))


def estimate(key: str, given: Sequence[Value]) -> Estimate:
    """Of the number ``key`` over the seeds' values, one at least."""
    measure, values = measure_of(key), [number(value) for value in given]
    mean = math.fsum(values) / len(values)
    pooled = [outcome for value in given if isinstance(value, list) for outcome in value]
    if pooled and len(set(values)) == 1:  # also where seeds agree by chance
        from scipy.stats import binomtest  # slow to import

        low, high = binomtest(sum(pooled), len(pooled)).proportion_ci(method="wilson")
        method = "wilson"
    elif len(values) > 1:
        half = _t_half_width(values)
        low, high, method = mean - half, mean + half, "t"
        if measure.is_rate:
            low, high = max(0.0, low), min(1.0, high)
    else:
        return Estimate(measure.scale * mean, None, None, "none")
    return Estimate(measure.scale * mean, measure.scale * low, measure.scale * high, method)


def partner(grid: Grid, row: Row) -> Row | None:
    """The 2-stage row that a 1-stage row is compared with: the one that it names, else its family's; None: there is
    none."""
    if row.stages != 1:
        return None
    two = (other for other in grid.rows if other.stages == 2)
    return next((other for other in two if other.name == row.partner or other.family == row.family), None)


def _gains(grid: Grid, done: Mapping[tuple[str, int], CellResult], keys: Sequence[str]) -> list[Gain]:
    gains = []
    for one in grid.rows:
        two = partner(grid, one)
        if two is None:
            continue
        seeds = sorted(seed for name, seed in done if name == one.name and (two.name, seed) in done)
        found = {}
        for key in keys:
            pairs = [(done[two.name, seed].values.get(key), done[one.name, seed].values.get(key)) for seed in seeds]
            pairs = [pair for pair in pairs if None not in pair]
            if pairs:
                found[key] = gain(measure_of(key), pairs)
        gains.append(Gain(one.family, two, found))
    return gains


def gain(measure: Measure, pairs: Sequence[tuple[Value, Value]]) -> Estimate:
    """Of each seed's first value over its second."""
    scale = measure.scale
    differences = [number(first) - number(second) for first, second in pairs]
    mean = math.fsum(differences) / len(differences)
    if all(isinstance(first, list) and isinstance(second, list) for first, second in pairs):
        low, high = bootstrap([np.subtract(first, second) for first, second in pairs])
        return Estimate(scale * mean, scale * low, scale * high, "bootstrap")
    if len(differences) == 1:
        return Estimate(scale * mean, None, None, "none")
    half = _t_half_width(differences)
    return Estimate(scale * mean, scale * (mean - half), scale * (mean + half), "t")


def bootstrap(differences: Sequence[np.ndarray]) -> tuple[float, float]:
    """95% interval of a mean difference, from the differences (episodes,) of each seed's trials: seeds are drawn with
    replacement, and of each that is drawn, as many episodes as it has; all have as many."""
    table = np.stack(differences)  # (seeds, episodes)
    rng = np.random.default_rng(RESAMPLING_SEED)
    seeds, episodes = table.shape
    which = rng.integers(seeds, size=(RESAMPLES, seeds, 1))
    means = table[which, rng.integers(episodes, size=(RESAMPLES, seeds, episodes))].mean((1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _t_half_width(values: Sequence[float]) -> float:
    """Of the 95% interval of a mean, by Student's t over the values."""
    from scipy.stats import t  # slow to import

    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return float(t.ppf(0.975, len(values) - 1)) * math.sqrt(variance / len(values))


# -- text --------------------------------------------------------------------------------------------------------------


def write_tables(report: Report, folder: Path) -> tuple[Path, Path]:
    """``table.csv`` and ``table.md``."""
    for name, text in ((CSV_FILE, csv_table(report)), (MARKDOWN_FILE, markdown(report))):
        write_text(folder / name, text)
    return folder / CSV_FILE, folder / MARKDOWN_FILE


def csv_table(report: Report) -> str:
    """A line per row; a number in its own unit as shown, with its interval's ends and method in columns beside it."""
    out = io.StringIO()
    columns = list(report.grid.rows[0].columns)
    numbers = [f"{key} {part}".rstrip() for key in report.keys for part in ("", "low", "high", "interval")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", *columns, "seeds", "status", *numbers])
    for line in report.lines:
        shown = [CHECK if value is True else "" if value is False else value for value in line.row.columns.values()]
        cells: list[object] = [line.row.name, *shown, line.seeds[0], _status(line) or "done"]
        for key in report.keys:
            value = line.estimates.get(key)
            cells += [""] * 4 if value is None else [value.mean, value.low, value.high, value.method]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


def markdown(report: Report) -> str:
    """The grid's title and :func:`tables`."""
    return f"# {report.grid.title}\n\n{tables(report)}\n"


def tables(report: Report) -> str:
    """A table per measure that has settings, in the paper's layout, one of the others, the gains, and a caption."""
    parts = []
    for name, keys in panels(report.keys).items():
        titles = [setting or measure_of(key).title for setting, key in keys]
        parts.append((f"**{name}**\n\n" if name else "") + _table(report, titles, [key for _, key in keys]))
    if any(gain.estimates for gain in report.gains):
        parts.append(_gains_table(report))
    failed = [
        f"- {line.row.name}/seed{seed}, in {words}" for line in report.lines for seed, words in line.failed.items()
    ]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(failed))
    return "\n\n".join([*parts, caption(report)])


def panels(keys: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Keys by measure, as (setting, key); those without a setting all under ""."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key in keys:
        setting, _, _ = key.rpartition("/")
        found.setdefault(measure_of(key).title if setting else "", []).append((setting, key))
    return dict(sorted(found.items(), key=lambda item: item[0] == ""))


def _table(report: Report, titles: Sequence[str], keys: Sequence[str]) -> str:
    columns = list(report.grid.rows[0].columns)
    marked = any(_status(line) for line in report.lines)
    head = [*columns, *titles, *(["status"] if marked else [])]
    rows = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join([":-:"] * len(columns) + ["---"] * (len(head) - len(columns))) + "|",
    ]
    for line in report.lines:
        cells = [CHECK if value is True else " " if value is False else value for value in line.row.columns.values()]
        cells += [_text(line.estimates.get(key), measure_of(key).digits) for key in keys]
        rows.append("| " + " | ".join([*cells, *([_status(line)] if marked else [])]) + " |")
    return "\n".join(rows)


def _gains_table(report: Report) -> str:
    """Of the measures that have settings, or of all where none has."""
    shown = panels(report.keys)
    rows = []
    for name, keys in ({name: keys for name, keys in shown.items() if name} or shown).items():
        if not rows:
            titles = [setting or measure_of(key).title for setting, key in keys]
            rows = [
                "| gain of 2-stage over 1-stage | of | " + " | ".join(titles) + " |",
                "|---" * (2 + len(keys)) + "|",
            ]
        for gain in report.gains:
            cells = [_text(gain.estimates.get(key), measure_of(key).digits, signed=True) for _, key in keys]
            rows.append(f"| {name} | {gain.title} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _status(line: Line) -> str:
    done, wanted = line.seeds
    parts = [f"{done} of {wanted} seeds"] if done < wanted else []
    return ", ".join(parts + [f"seed {seed} FAILED" for seed in line.failed])


def _text(value: Estimate | None, digits: int, signed: bool = False) -> str:
    if value is None:
        return MISSING
    mean = as_text(value.mean, digits, signed)
    if value.low is None:
        return mean
    return f"{mean} [{as_text(value.low, digits)}, {as_text(value.high, digits)}]"


def as_text(value: float, digits: int, signed: bool = False) -> str:
    """Rounded; no -0."""
    return f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"


def caption(report: Report) -> str:
    """What was run, on what, and what the intervals are, from the cells' own settings."""
    seeds = max((line.seeds[0] for line in report.lines), default=0)
    learned = report.settings[report.grid.rows[0].name]["learned"]
    train, data = learned["train"], learned["data"]
    steps = {_steps(report.settings[row.name]["learned"]): None for row in report.grid.rows}
    methods = {value.method for line in report.lines for value in line.estimates.values()}
    methods |= {value.method for gain in report.gains for value in gain.estimates.values()}
    lines = [
        f"Configuration `{report.preset}` (expert {train['model']}, VLM {train['vlm']}), {seeds} seed"
        f"{'s' if seeds != 1 else ''}; "
        + "; ".join(sorted(steps))
        + f", batches of {train['bs'] * train['gradient_accumulation_steps']} per process."
    ]
    if "episodes" in data:
        flags = f" ({' '.join(data['train_flags'])})" if data.get("train_flags") else ""
        lines.append(f"{data['episodes']} demonstrations{flags}, {data['test_episodes']} held out.")
    if report.trials:
        few, many = report.trials[0], report.trials[-1]
        lines.append(f"Rates: {few if few == many else f'{few} to {many}'} episodes per setting and seed.")
    if "t" in methods:
        lines.append("Intervals: 95%, of the mean by Student's t over the seeds, rates cut at 0 and 100.")
    if "wilson" in methods:
        lines.append(
            "A rate of one seed, or the same for every seed, has Wilson's 95% interval over its pooled episodes."
        )
    if "bootstrap" in methods:
        lines.append(
            "Gains in rates: 95% bootstrap interval over seeds and over the episodes, which both rows begin alike."
        )
    return " ".join(lines)


def _steps(learned: Mapping[str, Any]) -> str:
    prior, steps = learned["va_prior"], learned["train"]["max_iterations"]
    return (
        f"1-stage: {steps} steps"
        if prior is None
        else f"2-stage: {prior['max_iterations']} steps of the VA prior, then {steps} steps"
    )
