"""The bar chart of a grid: settings side by side, a bar per row with its interval, the gain of pretraining above."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from apt.ablation.report import Estimate, Report, caption, measure_of, panels

CHART_FILE = "chart.png"
# Okabe and Ito's colours, which colour-blind people tell apart; a family's 1-stage bar is a lighter tint, hatched.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, FAINT = "#22262c", "#d9dce1"
FONT = 10  # points
GROUP = 0.84  # of the room between two settings that their bars take
STUB = 0.006  # of the panel's height: a bar of 0 shows whose it is
WIDTH, PANEL_HEIGHT = 10.0, 3.3  # inches


def write_chart(report: Report) -> Path:
    """``chart.png`` in the grid's folder."""
    shown = panels(report.keys)
    rest = shown.pop("", [])
    if not shown:  # no measure has settings: a panel each
        shown = {measure_of(key).title: [("", key)] for _, key in rest}
    figure = Figure(figsize=(WIDTH, PANEL_HEIGHT * max(1, len(shown)) + 1.0), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(shown)), squeeze=False)[:, 0]
    for panel, (title, keys) in zip(axes, shown.items(), strict=False):
        _draw(panel, title, keys, report)
    if not shown:
        axes[0].text(0.5, 0.5, "no cell is done", ha="center", va="center", fontsize=FONT, color=INK)
        axes[0].set_axis_off()
    else:
        _legend(figure, axes[0], report)
    figure.suptitle(report.study.grid.title, fontsize=FONT + 3, fontweight="bold", color=INK, x=0.02, ha="left")
    figure.supxlabel(_wrapped(_footnote(report)), fontsize=FONT - 2, color=INK, x=0.02, ha="left")
    path = report.study.folder / CHART_FILE
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def _draw(panel: Axes, title: str, keys: list[tuple[str, str]], report: Report) -> None:
    is_rate = measure_of(keys[0][1]).is_rate
    values = [line.estimates.get(key) for line in report.lines for _, key in keys]
    ends = [max(value.mean, value.high or 0.0) for value in values if value is not None]
    top = 100.0 if is_rate else max([*ends, 1e-9])
    width = GROUP / len(report.lines)
    families = list(dict.fromkeys(line.row.family for line in report.lines))
    highest: dict[tuple[int, str], float] = {}
    centres: dict[tuple[int, str], list[float]] = {}
    for number, line in enumerate(report.lines):
        style = _style(line.row.family, line.row.stages, families, report)
        for place, (_, key) in enumerate(keys):
            value = line.estimates.get(key)
            if value is None:
                continue
            x = place - GROUP / 2 + (number + 0.5) * width
            panel.bar(x, max(value.mean, STUB * top), 0.9 * width, **style)
            if value.low is not None:
                panel.plot([x, x], [value.low, value.high], color=INK, linewidth=1.1, solid_capstyle="butt")
            group = place, line.row.family
            highest[group] = max(highest.get(group, 0.0), value.mean, value.high or 0.0)
            centres.setdefault(group, []).append(x)
    for (place, family), height in highest.items():
        gain = report.gains.get(family, {}).get(keys[place][1])
        own = next(
            (line for line in report.lines if line.row.family == family and keys[place][1] in line.estimates), None
        )
        if gain is None and (own is None or family in report.gains):
            continue
        text = (
            _label(own.estimates[keys[place][1]], keys[place][1]) if gain is None else _label(gain, keys[place][1], "+")
        )
        x = sum(centres[place, family]) / len(centres[place, family])
        weight = "normal" if gain is None else "bold"
        panel.text(x, height + 0.02 * top, text, ha="center", va="bottom", fontsize=FONT, color=INK, fontweight=weight)
    panel.set_title(title, loc="left", fontsize=FONT + 1, color=INK)
    panel.set_ylim(0, 1.16 * top)
    if is_rate:
        panel.set_yticks([0, 25, 50, 75, 100])
    panel.set_xlim(-0.55, len(keys) - 0.45)
    panel.set_xticks(range(len(keys)), [setting for setting, _ in keys], fontsize=FONT)
    panel.grid(axis="y", color=FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelcolor=INK, labelsize=FONT)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)


def _style(family: str, stages: int, families: list[str], report: Report) -> dict:
    color = COLORS[families.index(family) % len(COLORS)]
    if family in report.gains and stages == 1:
        return {"facecolor": _lighter(color), "edgecolor": color, "hatch": "///", "linewidth": 0.8}
    return {"facecolor": color, "edgecolor": color, "linewidth": 0.8}


def _legend(figure: Figure, panel: Axes, report: Report) -> None:
    families = list(dict.fromkeys(line.row.family for line in report.lines))
    handles, labels = [], []
    for line in report.lines:
        style = _style(line.row.family, line.row.stages, families, report)
        handles.append(panel.bar([0], [0], **style))
        labels.append(line.row.label if line.row.family in report.gains else line.row.family)
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=min(3, len(labels)),
        frameon=False,
        fontsize=FONT,
        labelcolor=INK,
    )


def _label(value: Estimate, key: str, sign: str = "") -> str:
    return f"{value.mean:{sign}.{measure_of(key).digits}f}"


def _footnote(report: Report) -> str:
    what = "Labels: gain of 2-stage over 1-stage. " if report.gains else ""
    return what + caption(report).replace("`", "")


def _wrapped(text: str, characters: int = 150) -> str:
    lines, line = [], ""
    for word in text.split():
        if len(line) + len(word) + 1 > characters:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def _lighter(color: str) -> tuple[float, ...]:
    return tuple(0.45 * channel + 0.55 for channel in to_rgb(color))
