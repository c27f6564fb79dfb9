"""The table of a grid, from the result files of its cells alone: means over seeds with their intervals."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apt.ablation.grid import Cell, Row
from apt.ablation.study import Study
from data_utils.files import write_text

CHECK, MISSING = "✓", "–"
CSV_FILE, MARKDOWN_FILE = "table.csv", "table.md"


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
    "position_cm": Measure("open-loop position error (cm, less is better)"),
    "position_ratio": Measure("position error / mean motion's (less is better)"),
    "language_cm": Measure("path change, instruction swapped (cm)"),
    "language_ratio": Measure("path change / spread between noise seeds", digits=3),
}
TRIALS = "episodes"  # SETTING/episodes: how many a rate of that setting is of


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its 95% interval where there is one; both as shown, that is scaled."""

    mean: float
    low: float | None
    high: float | None
    method: str
    """t: over seeds; wilson: over the pooled episodes; none: a single seed, or a gain in a rate that is the same on
    every seed."""


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
class Report:
    study: Study
    lines: list[Line]
    keys: list[str]
    trials: list[int]
    """Numbers of episodes that rates are of, per setting and seed."""
    gains: dict[str, dict[str, Estimate]]
    """By family that was run with one stage and with two, then by key: 2-stage less 1-stage of the same seed."""


def measure_of(key: str) -> Measure:
    name = key.rpartition("/")[2]
    return MEASURES.get(name, Measure(name.replace("_", " ")))


def build_report(study: Study) -> Report:
    """From the files that are there. Raises ``StudyError`` for results of other settings."""
    results = {cell: study.result(cell) for cell in study.cells}
    done = {cell: values for cell, values in results.items() if values is not None}
    keys = list(dict.fromkeys(key for values in done.values() for key in values if not key.endswith(f"/{TRIALS}")))
    lines = []
    for row in study.grid.rows:
        cells = [cell for cell in study.cells if cell.row == row]
        found = [done[cell] for cell in cells if cell in done]
        by_key = {key: [values for values in found if key in values] for key in keys}
        estimates = {key: estimate(key, given) for key, given in by_key.items() if given}
        values = {key: [measure_of(key).scale * given[key] for given in by_key[key]] for key in estimates}
        failures = {cell.seed: study.failure(cell) for cell in cells if cell not in done}
        failed = {seed: words for seed, words in failures.items() if words is not None}
        lines.append(Line(row, estimates, values, (len(found), len(cells)), failed))
    trials = {int(n) for values in done.values() for key, n in values.items() if key.endswith(f"/{TRIALS}")}
    return Report(study, lines, keys, sorted(trials), _gains(study, done, keys))


def estimate(key: str, results: Sequence[Mapping[str, float]]) -> Estimate:
    """Of the number ``key`` over the seeds' results, one at least."""
    measure, values = measure_of(key), [result[key] for result in results]
    mean = math.fsum(values) / len(values)
    trials = [result.get(f"{key.rpartition('/')[0]}/{TRIALS}") for result in results]
    if measure.is_rate and None not in trials and len(set(values)) == 1:  # also where seeds agree by chance
        from scipy.stats import binomtest  # slow to import

        count = int(sum(trials))
        low, high = binomtest(round(mean * count), count).proportion_ci(method="wilson")
        method = "wilson"
    elif len(values) > 1:
        half = _t_half_width(values)
        low, high, method = mean - half, mean + half, "t"
        if measure.is_rate:
            low, high = max(0.0, low), min(1.0, high)
    else:
        return Estimate(measure.scale * mean, None, None, "none")
    return Estimate(measure.scale * mean, measure.scale * low, measure.scale * high, method)


def _gains(
    study: Study, done: Mapping[Cell, Mapping[str, float]], keys: Sequence[str]
) -> dict[str, dict[str, Estimate]]:
    pairs: dict[str, dict[int, Row]] = {}
    for row in study.grid.rows:
        pairs.setdefault(row.family, {})[row.stages] = row
    gains: dict[str, dict[str, Estimate]] = {}
    for family, rows in pairs.items():
        if set(rows) != {1, 2}:
            continue
        by_seed = {stages: {cell.seed: done[cell] for cell in done if cell.row == row} for stages, row in rows.items()}
        seeds = sorted(by_seed[1].keys() & by_seed[2].keys())
        gains[family] = {}
        for key in keys:
            differences = [by_seed[2][seed][key] - by_seed[1][seed][key] for seed in seeds]
            if differences:
                gains[family][key] = _gain(measure_of(key), differences)
    return gains


def _gain(measure: Measure, differences: Sequence[float]) -> Estimate:
    mean, scale = math.fsum(differences) / len(differences), measure.scale
    # Rates of a few episodes are coarse: seeds that agree do not mean that there is nothing to doubt.
    if len(differences) == 1 or (measure.is_rate and len(set(differences)) == 1):
        return Estimate(scale * mean, None, None, "none")
    half = _t_half_width(differences)
    return Estimate(scale * mean, scale * (mean - half), scale * (mean + half), "t")


def _t_half_width(values: Sequence[float]) -> float:
    """Of the 95% interval of a mean, by Student's t over the values."""
    from scipy.stats import t  # slow to import

    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return float(t.ppf(0.975, len(values) - 1)) * math.sqrt(variance / len(values))


# -- text --------------------------------------------------------------------------------------------------------------


def write_tables(report: Report) -> tuple[Path, Path]:
    """``table.csv`` and ``table.md`` in the grid's folder."""
    folder = report.study.folder
    for name, text in ((CSV_FILE, csv_table(report)), (MARKDOWN_FILE, markdown(report))):
        write_text(folder / name, text)
    return folder / CSV_FILE, folder / MARKDOWN_FILE


def csv_table(report: Report) -> str:
    """A line per row; a number in its own unit as shown, with its interval's ends and method in columns beside it."""
    out = io.StringIO()
    columns = list(report.study.grid.rows[0].columns)
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
    """A table per measure that has settings, in the paper's layout, one of the others, the gains, and a caption."""
    grid = report.study.grid
    parts = [f"# {grid.title}"]
    for name, keys in panels(report.keys).items():
        titles = [setting or measure_of(key).title for setting, key in keys]
        parts.append((f"**{name}**\n\n" if name else "") + _table(report, titles, [key for _, key in keys]))
    if any(report.gains.values()):
        parts.append(_gains_table(report))
    failed = [
        f"- {line.row.name}/seed{seed}, in {words}" for line in report.lines for seed, words in line.failed.items()
    ]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(failed))
    return "\n\n".join([*parts, caption(report)]) + "\n"


def panels(keys: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Keys by measure, as (setting, key); those without a setting all under ""."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key in keys:
        setting, _, _ = key.rpartition("/")
        found.setdefault(measure_of(key).title if setting else "", []).append((setting, key))
    return dict(sorted(found.items(), key=lambda item: item[0] == ""))


def _table(report: Report, titles: Sequence[str], keys: Sequence[str]) -> str:
    columns = list(report.study.grid.rows[0].columns)
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
        for family, gains in report.gains.items():
            cells = [_text(gains.get(key), measure_of(key).digits, signed=True) for _, key in keys]
            rows.append(f"| {name} | {family} | " + " | ".join(cells) + " |")
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
    study = report.study
    seeds = max((line.seeds[0] for line in report.lines), default=0)
    cell = study.cells[0]
    steps = {row.stages: _steps(next(c for c in study.cells if c.row == row)) for row in study.grid.rows}
    methods = {value.method for line in report.lines for value in line.estimates.values()}
    methods |= {value.method for gains in report.gains.values() for value in gains.values()}
    lines = [
        f"Configuration `{study.preset}` (expert {cell.config.model}, VLM {cell.config.vlm}), {seeds} seed"
        f"{'s' if seeds != 1 else ''}; "
        + "; ".join(f"{stages}-stage: {text}" for stages, text in sorted(steps.items()))
        + f", batches of {cell.config.bs * cell.config.gradient_accumulation_steps} per process."
    ]
    if "episodes" in study.data:
        lines.append(f"{study.data['episodes']} demonstrations, {study.data['test_episodes']} held out.")
    if report.trials:
        few, many = report.trials[0], report.trials[-1]
        lines.append(f"Rates: {few if few == many else f'{few} to {many}'} episodes per setting and seed.")
    if "t" in methods:
        lines.append("Intervals: 95%, of the mean by Student's t over the seeds, rates cut at 0 and 100.")
    if "wilson" in methods:
        lines.append(
            "A rate of one seed, or the same for every seed, has Wilson's 95% interval over its pooled episodes."
        )
    return " ".join(lines)


def _steps(cell: Cell) -> str:
    vla = f"{cell.config.max_iterations} steps"
    return vla if cell.prior is None else f"{cell.prior.config.max_iterations} steps of the VA prior, then {vla}"
