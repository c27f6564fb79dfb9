"""The picture of an evaluation: a panel per table, a bar per model with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from examples.libero.summary_tables import MEAN, Table

COLORS = ("#3b6fb6", "#e08a3c", "#4d9d6a", "#b6547a", "#7a68b3", "#8a8f98", "#c2a83e", "#4aa6b5")
INK, FAINT = "#22262c", "#d9dce1"
FONT = 9  # points, of all text but the panels' titles
STUB = 1.0  # %, height of the bar of a rate of 0, which shows whose it is
GROUP = 0.8  # of the room between two columns that their bars take
PANEL_HEIGHT, COLUMN_WIDTH, MARGIN_WIDTH = 2.9, 1.25, 1.2  # inches


def plot(tables: Sequence[Table], path: Path) -> None:
    """Write the tables as one PNG."""
    shown = [[column for column in table.columns if _filled(table, column)] for table in tables]
    models = list(dict.fromkeys(model for table in tables for model in table.rows))
    color_of = {model: COLORS[number % len(COLORS)] for number, model in enumerate(models)}
    bars = max(1.0, len(models) / 3)  # more models need wider columns
    width = MARGIN_WIDTH + max(len(columns) for columns in shown) * COLUMN_WIDTH * bars
    figure = Figure(figsize=(max(6.0, width), PANEL_HEIGHT * len(tables) + 0.5), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)  # inches
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tables), squeeze=False)[:, 0]
    for panel, table, columns in zip(panels, tables, shown, strict=True):
        _draw(panel, table, columns, color_of)
        panel.set_xlim(-0.6, max(len(columns) for columns in shown) - 0.4)  # bars of one width in all panels
    handles = [panels[0].bar([0], [0], color=color, label=model) for model, color in color_of.items()]
    figure.legend(
        handles=handles,
        labels=list(color_of),
        loc="outside upper left",
        ncols=len(models),
        frameon=False,
        fontsize=FONT,
    )
    figure.savefig(path, dpi=150, facecolor="white")


def _filled(table: Table, column: str) -> bool:
    return any(column in cells for cells in table.rows.values())


def _draw(panel: Axes, table: Table, columns: list[str], color_of: dict[str, str]) -> None:
    width = GROUP / len(color_of)
    for number, (model, color) in enumerate(color_of.items()):
        for place, column in enumerate(columns):
            cell = table.rows.get(model, {}).get(column)
            if cell is None:
                continue
            x = place - GROUP / 2 + (number + 0.5) * width
            low, high = (100 * end for end in cell.interval)
            rate = 100 * cell.rate
            panel.bar(x, max(rate, STUB), 0.92 * width, color=color if column.startswith(MEAN) else _lighter(color))
            panel.plot([x, x], [low, high], color=INK, linewidth=1.0)
            panel.text(x, max(rate, high) + 2, f"{rate:.0f}", ha="center", va="bottom", fontsize=FONT, color=INK)
    panel.set_title(table.title, loc="left", fontsize=11, fontweight="bold", color=INK)
    panel.set_ylabel("success (%)", fontsize=FONT, color=INK)
    panel.set_ylim(0, 116)
    panel.set_yticks([0, 25, 50, 75, 100])
    panel.set_xticks(range(len(columns)), [column.replace(" ", "\n", 1) for column in columns], fontsize=FONT)
    panel.hlines([25, 50, 75, 100], -0.55, len(columns) - 0.45, color=FAINT, linewidth=0.7, zorder=0)
    panel.tick_params(length=0, labelcolor=INK, labelsize=FONT)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)
    panel.spines["bottom"].set_bounds(-0.55, len(columns) - 0.45)


def _lighter(color: str) -> tuple[float, ...]:
    return tuple(0.78 * channel + 0.22 for channel in to_rgb(color))
