"""A page whose tables and charts are made from cells' results, and can be made again.

    python -m apt.ablation.page docs/results.md

Wherever the page has a line ``<!-- grid FOLDER -->``, what follows up to ``<!-- end -->`` is written anew: the tables
of the results in FOLDER (relative to the page, ``ROW/seedN.json`` in it), and below them the chart and the curves,
which are drawn into FOLDER. All else is left alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from apt.ablation.chart import CHART_FILE, write_chart
from apt.ablation.curves import CURVES_FILE, has_curves, write_curves
from apt.ablation.report import report_of_results, tables
from data_utils.cli import CommandLineError, Parser
from data_utils.files import write_text

BLOCK = re.compile(r"(<!-- grid (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: Path) -> str:
    """The page's text as the results say; nothing is written. Raises ``ValueError`` for a folder without results."""

    def block(found: re.Match) -> str:
        folder = found[2]
        report = report_of_results(page.parent / folder)
        parts = [tables(report), f"![{report.grid.title}]({folder}/{CHART_FILE})"]
        if has_curves(report):
            parts.append(f"![Curves of training]({folder}/{CURVES_FILE})")
        return found[1] + "\n\n".join(parts) + f"\n\n{found[3]}"

    return BLOCK.sub(block, page.read_text(encoding="utf-8"))


def grids(page: Path) -> list[Path]:
    """Folders of the results that the page shows."""
    return [page.parent / found[2] for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m apt.ablation.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("page", type=Path, help="a Markdown file")
    try:
        page = parser.parse_args(argv).page
        if not page.is_file():
            raise CommandLineError(f"there is no page {page}")
        folders = grids(page)
        if not folders:
            raise CommandLineError(f"{page} has no line <!-- grid FOLDER --> with an <!-- end --> behind it")
        text = filled(page)
        for folder in folders:
            report = report_of_results(folder)
            write_chart(report, folder)
            write_curves(report, folder)
        write_text(page, text)
    except (CommandLineError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{page}: {len(folders)} grids")
    return 0


if __name__ == "__main__":
    sys.exit(main())
