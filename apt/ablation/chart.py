"""The bar chart of a grid: settings side by side, a bar per row with its interval, the gain of pretraining above."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from apt.ablation.report import Line, Report, as_text, caption, measure_of, panels

CHART_FILE = "chart.png"
# Okabe and Ito's colours, which colour-blind people tell apart; a family's 1-stage bar is a lighter tint, hatched.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
INK, FAINT = "#22262c", "#d9dce1"
FONT = 10  # points
LINE = 150  # characters of the footnote
SMALL_LINE = 24  # characters of a small panel's title
GROUP = 0.84  # of the room between two settings that their bars take
STUB = 0.006  # of the panel's height: a bar of 0 shows whose it is
WIDTH, PANEL_HEIGHT = 10.0, 3.3  # inches


def write_chart(report: Report, folder: Path) -> Path:
    """``chart.png``: a panel per measure that has settings, small ones below for the others."""
    shown = panels(report.keys)
    small = {_wrapped(measure_of(key).title): [("", key)] for _, key in shown.pop("", [])}
    rows = [[title] * max(1, len(small)) for title in shown] + ([list(small)] if small else [])
    figure = Figure(figsize=(WIDTH, PANEL_HEIGHT * max(1, len(rows)) + 1.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    FigureCanvasAgg(figure)
    families = list(dict.fromkeys(line.row.family for line in report.lines))
    lines = sorted(report.lines, key=lambda line: families.index(line.row.family))  # a family's bars stand together
    if rows:
        axes = figure.subplot_mosaic(rows)
        for title, keys in {**shown, **small}.items():
            _draw(axes[title], title, keys, lines, families, report)
    else:
        axes = figure.subplots()
        axes.text(0.5, 0.5, "no cell is done", ha="center", va="center", fontsize=FONT, color=INK)
        axes.set_axis_off()
    _legend(figure, lines, families, report)
    figure.supxlabel(_footnote(report), fontsize=FONT - 2, color=INK, x=0.02, ha="left")
    path = folder / CHART_FILE
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def _wrapped(title: str) -> str:
    """On lines that fit a small panel."""
    return "\n".join(textwrap.wrap(title, SMALL_LINE))


def _draw(
    panel: Axes, title: str, keys: list[tuple[str, str]], lines: list[Line], families: list[str], report: Report
) -> None:
    is_rate = measure_of(keys[0][1]).is_rate
    top = 100.0 if is_rate else max([1e-9, *(_height(line, key) for line in lines for _, key in keys)])
    width = GROUP / len(lines)
    for number, line in enumerate(lines):
        for place, (_, key) in enumerate(keys):
            value = line.estimates.get(key)
            if value is None:
                continue
            x = place - GROUP / 2 + (number + 0.5) * width
            panel.bar(x, max(value.mean, STUB * top), 0.9 * width, **_style(line, families, report))
            if value.low is not None:
                panel.plot([x, x], [max(0.0, value.low), value.high], color=INK, linewidth=1.1, solid_capstyle="butt")
            dots = {"color": "white", "markeredgecolor": INK, "markersize": 4.5, "markeredgewidth": 0.9}
            panel.plot([x] * len(line.values[key]), line.values[key], "o", clip_on=False, zorder=3, **dots)
            label = _label(line, key, report)
            if label:
                height = max(_height(other, key) for other in lines if other.row.family == line.row.family)
                panel.text(x, height + 0.03 * top, label, ha="center", va="bottom", fontsize=FONT, color=INK)
    panel.set_title(title, loc="left", fontsize=FONT + 1, color=INK)
    panel.set_ylim(0, 1.18 * top)
    if is_rate:
        panel.set_yticks([0, 25, 50, 75, 100])
    panel.set_xlim(-0.55, len(keys) - 0.45)
    panel.set_xticks(range(len(keys)), [setting for setting, _ in keys], fontsize=FONT)
    panel.grid(axis="y", color=FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, pad=6, labelcolor=INK, labelsize=FONT)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)


def _height(line: Line, key: str) -> float:
    """Of all that is drawn of a bar."""
    value = line.estimates.get(key)
    return 0.0 if value is None else max(value.mean, value.high or 0.0, *line.values[key])


def _label(line: Line, key: str, report: Report) -> str:
    """The gain over one stage above a 2-stage bar that has such a counterpart; else the bar's own value."""
    digits = measure_of(key).digits
    gain = report.gain_of(line.row.family)
    if gain is None:
        return as_text(line.estimates[key].mean, digits)
    found = gain.estimates.get(key)
    return as_text(found.mean, digits, signed=True) if line.row.stages == 2 and found is not None else ""


def _style(line: Line, families: list[str], report: Report) -> dict:
    color = COLORS[families.index(line.row.family) % len(COLORS)]
    style = {"facecolor": color, "edgecolor": color, "linewidth": 0.8}
    if report.gain_of(line.row.family) is not None and line.row.stages == 1:
        style |= {"facecolor": _lighter(color), "hatch": "///"}
    return style


def _legend(figure: Figure, lines: list[Line], families: list[str], report: Report) -> None:
    labels = [
        (line.row.label if report.gain_of(line.row.family) is not None else line.row.family)
        + (f" ({line.seeds[0]} of {line.seeds[1]} seeds)" if line.seeds[0] < line.seeds[1] else "")
        for line in lines
    ]
    figure.legend(
        [Patch(**_style(line, families, report)) for line in lines],
        labels,
        title=report.grid.title,
        title_fontproperties={"weight": "bold", "size": FONT + 3},
        alignment="left",
        loc="outside upper left",
        ncols=min(3, len(families)) if report.gains else 2,  # filled column by column: a family each
        frameon=False,
        fontsize=FONT,
        labelcolor=INK,
    )


def _footnote(report: Report) -> str:
    labels = "Labels: gain of 2-stage over 1-stage. " if report.gains else ""
    text = f"{labels}Dots: seeds. {caption(report)}".replace("`", "")
    return "\n".join(textwrap.wrap(text, LINE))


def _lighter(color: str) -> tuple[float, ...]:
    return tuple(0.45 * channel + 0.55 for channel in to_rgb(color))
