"""A page's tables and pictures come from result files by one command, and what is written around them stays."""

from __future__ import annotations

import pytest

from apt.ablation.chart import CHART_FILE
from apt.ablation.page import filled, grids, main
from apt.ablation.report import build_report, tables
from tests.ablation.helpers import finish, make_study
from tests.training.helpers import REPOSITORY

TEXT = "# What came out\n\n<!-- grid results/table2 -->\nold numbers\n<!-- end -->\n\nIn words.\n"


@pytest.fixture
def page(tmp_path):
    study = make_study(tmp_path, "table2", seeds=2)
    for cell in study.cells:
        finish(study, cell)
    path = tmp_path / "page.md"
    path.write_text(TEXT)
    return path, study


def test_what_stands_between_the_marks_is_made_of_the_results_and_the_rest_is_left_alone(page):
    path, study = page
    assert main([str(path)]) == 0
    text = path.read_text()
    assert text == filled(path), "made again, it is the same"
    assert text.startswith("# What came out\n\n<!-- grid results/table2 -->\n") and text.endswith("\n\nIn words.\n")
    assert tables(build_report(study)) in text and "old numbers" not in text
    assert f"](results/table2/{CHART_FILE})" in text
    assert (study.results / "table2" / CHART_FILE).stat().st_size > 10_000
    assert not (study.results / "table2/curves.png").exists() and "curves.png" not in text


def test_other_results_make_another_page(page):
    path, study = page
    main([str(path)])
    finish(study, study.cells[0], {"position_cm": 1234.5})
    assert "1234.5" not in path.read_text() and filled(path) != path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [("no mark", "has no line <!-- grid FOLDER -->"), (TEXT.replace("table2", "fusion"), "holds 0 results")],
)
def test_a_page_that_cannot_be_made_is_left_as_it_is(page, capsys, text, message):
    path, _ = page
    path.write_text(text)
    assert main([str(path)]) == 2
    assert message in capsys.readouterr().err and path.read_text() == text
    assert main([str(path.parent / "none.md")]) == 2


def test_the_repositorys_pages_say_what_its_results_say():
    for path in (REPOSITORY / "docs").glob("*.md"):
        if path.name != "ablations.md" and grids(path):  # that one explains the marks
            assert filled(path) == path.read_text(encoding="utf-8"), f"run python -m apt.ablation.page {path}"
