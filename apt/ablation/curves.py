"""The curves of a grid whose cells hold episodes out: loss and held-out position error by training step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from apt.ablation.chart import COLORS, FAINT, FONT, INK
from apt.ablation.grid import Row
from apt.ablation.study import Study

CURVES_FILE = "curves.png"
# Losses of rows that predict something else, or in another unit, are not comparable: the error is.
PANELS = {"loss/total": "training loss (of what the row predicts)", "eval/position_cm": "held-out position error (cm)"}
STYLES = ("-", "--", ":")
WIDTH, HEIGHT = 11.0, 4.6  # inches


def write_curves(study: Study) -> Path | None:
    """``curves.png`` in the grid's folder, a panel per number of ``PANELS``; None where nothing was evaluated."""
    found = {tag: [_curves(study, row, tag) for row in study.grid.rows] for tag in PANELS}
    if not any(found["eval/position_cm"]):
        return None
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (tag, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        _draw(panel, title, [row.family for row in study.grid.rows], found[tag])
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title=study.grid.title,
        title_fontproperties={"weight": "bold", "size": FONT + 3},
        alignment="left",
        loc="outside upper left",
        ncols=3,
        frameon=False,
        fontsize=FONT,
        labelcolor=INK,
    )
    path = study.folder / CURVES_FILE
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def _curves(study: Study, row: Row, tag: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each seed of which there are some."""
    tables = [study.metrics(cell) for cell in study.cells if cell.row == row]
    return [read_curve(table, tag) for table in tables if table.is_file() and len(read_curve(table, tag)[0])]


def read_curve(table: Path, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a number of a run's ``metrics.jsonl``; of a step that was done again, the last."""
    rows = (json.loads(line) for line in table.read_text(encoding="utf-8").splitlines())
    values = {row["step"]: row[tag] for row in rows if tag in row}
    return np.array(sorted(values)), np.array([values[step] for step in sorted(values)])


def _draw(
    panel: Axes, title: str, labels: Sequence[str], curves: Sequence[list[tuple[np.ndarray, np.ndarray]]]
) -> None:
    """A colour per row, a line per seed."""
    for number, (label, seeds) in enumerate(zip(labels, curves, strict=True)):
        style = {"color": COLORS[number % len(COLORS)], "linestyle": STYLES[number // len(COLORS) % len(STYLES)]}
        style |= {"linewidth": 1.6, "marker": "o", "markersize": 2.5}
        for seed, (steps, values) in enumerate(seeds):
            panel.plot(steps, values, label=label if seed == 0 else None, **style)
    panel.set_title(title, loc="left", fontsize=FONT + 1, color=INK)
    panel.set_yscale("log")
    panel.set_xlabel("training step", fontsize=FONT, color=INK)
    panel.grid(axis="y", which="both", color=FAINT, linewidth=0.7)
    panel.tick_params(which="both", length=0, pad=6, labelcolor=INK, labelsize=FONT)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)
