"""The curves of a grid whose cells hold episodes out: loss and held-out position error by training step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from apt.ablation.chart import COLORS, FAINT, FONT, INK
from apt.ablation.grid import Row
from apt.ablation.report import Report

CURVES_FILE = "curves.png"
# Losses of rows that predict something else, or in another unit, are not comparable: the error is.
PANELS = {"loss/total": "training loss (of what the row predicts)", "eval/position_cm": "held-out position error (cm)"}
STYLES = ("-", "--", ":")
WIDTH, HEIGHT = 11.0, 4.6  # inches


def write_curves(report: Report, folder: Path) -> Path | None:
    """``curves.png``, a panel per number of ``PANELS``; None where no cell was evaluated while it trained."""
    if not has_curves(report):
        return None
    found = {tag: [_curves(report, row, tag) for row in report.grid.rows] for tag in PANELS}
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (tag, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        _draw(panel, title, [_label(report, row) for row in report.grid.rows], found[tag])
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title=report.grid.title,
        title_fontproperties={"weight": "bold", "size": FONT + 3},
        alignment="left",
        loc="outside upper left",
        ncols=3,
        frameon=False,
        fontsize=FONT,
        labelcolor=INK,
    )
    path = folder / CURVES_FILE
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def has_curves(report: Report) -> bool:
    """Whether some cell held episodes out and was evaluated on them."""
    return any("eval/position_cm" in result.curves for result in report.results.values())


def _label(report: Report, row: Row) -> str:
    alone = sum(other.family == row.family for other in report.grid.rows) == 1
    return row.family if alone else row.label


def _curves(report: Report, row: Row, tag: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each seed of which there are some."""
    found = [result.curves for (name, _), result in sorted(report.results.items()) if name == row.name]
    return [tuple(map(np.asarray, curves[tag])) for curves in found if tag in curves]


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
