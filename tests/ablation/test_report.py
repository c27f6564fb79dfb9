"""Every number in table and chart is one of the cells' result files, or follows from them."""

from __future__ import annotations

import csv
import io
import json

import cv2
import numpy as np
import pytest
from scipy import stats

from apt.ablation.chart import COLORS, write_chart
from apt.ablation.curves import read_curve, write_curves
from apt.ablation.report import build_report, csv_table, estimate, markdown, write_tables
from examples.statistics import wilson_interval
from tests.ablation.helpers import SETTINGS, finish, made_up, make_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = make_study(tmp_path_factory.mktemp("study"), "table2", seeds=3)
    study.prepare()
    for cell in study.cells:
        finish(study, cell)
    return study


def table_rows(report) -> dict[str, dict[str, str]]:
    return {row["row"]: row for row in csv.DictReader(io.StringIO(csv_table(report)))}


def test_means_are_those_of_the_result_files(study):
    rows = table_rows(build_report(study))
    for name in ("ki_1stage", "joint_2stage"):
        results = [study.result(cell) for cell in study.cells if cell.row.name == name]
        assert results == [made_up(cell) for cell in study.cells if cell.row.name == name]
        for key in ("position_cm", "language_ratio"):
            assert float(rows[name][key]) == pytest.approx(np.mean([result[key] for result in results]))
        for setting in SETTINGS:
            rates = [result[f"{setting}/success"] for result in results]
            assert float(rows[name][f"{setting}/success"]) == pytest.approx(100 * np.mean(rates))


def test_intervals_over_seeds_are_students_t(study):
    rows = table_rows(build_report(study))
    values = [study.result(cell)["position_cm"] for cell in study.cells if cell.row.name == "ki_2stage"]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    row = rows["ki_2stage"]
    assert row["position_cm interval"] == "t"
    assert float(row["position_cm low"]) == pytest.approx(low) and float(row["position_cm high"]) == pytest.approx(high)


def test_a_rate_of_one_seed_has_wilsons_interval_and_another_number_none():
    one = estimate("SO/success", [{"SO/success": 0.3, "SO/episodes": 10}])
    assert one.method == "wilson"
    assert (one.low / 100, one.high / 100) == pytest.approx(wilson_interval(3, 10), abs=1e-6)
    assert estimate("position_cm", [{"position_cm": 2.0}]).low is None


def test_a_rate_that_all_seeds_share_is_not_certain():
    same = estimate("UO/success", [{"UO/success": 0.0, "UO/episodes": 10}] * 3)
    assert same.method == "wilson" and same.low == 0
    assert same.high / 100 == pytest.approx(wilson_interval(0, 30)[1], abs=1e-6)


def test_rates_stay_between_none_and_all():
    wide = estimate("SO/success", [{"SO/success": 0.0, "SO/episodes": 4}, {"SO/success": 1.0, "SO/episodes": 4}])
    assert (wide.low, wide.high, wide.method) == (0.0, 100.0, "t")


def test_the_gain_pairs_the_seeds_of_one_and_two_stages(study):
    gain = build_report(study).gains["KI"]["UC/success"]
    by_name = {cell.name: study.result(cell)["UC/success"] for cell in study.cells}
    differences = [100 * (by_name[f"ki_2stage/seed{s}"] - by_name[f"ki_1stage/seed{s}"]) for s in range(3)]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((np.mean(differences), low, high))


def test_the_markdown_table_has_the_papers_columns_and_check_marks(study):
    text = markdown(build_report(study))
    lines = text.splitlines()
    head = lines.index("| KI | 2-Stage | Ft VLM | SO | UO | UC | UOUE |")
    marks = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines[head + 2 : head + 6]]
    assert marks == [["✓", "", ""], ["", "", "✓"], ["✓", "✓", ""], ["", "✓", "✓"]]
    assert (
        "3 seeds" in text
        and "Rates: 10 episodes per setting" in text
        and "Student's t" in text
        and "FAILED" not in text
    )


def test_failed_and_missing_cells_are_marked_and_leave_the_others_as_they_are(tmp_path):
    study = make_study(tmp_path, "table2", seeds=2)
    study.prepare()
    for cell in study.cells[:-1]:
        finish(study, cell)
    before = table_rows(build_report(study))
    study.note_failure(study.cells[-1], "joint_2stage/seed1 VLA: error: no disk")
    report = build_report(study)
    rows = table_rows(report)
    assert rows["joint_2stage"]["status"] == "1 of 2 seeds, seed 1 FAILED"
    assert {name: row for name, row in rows.items() if name != "joint_2stage"} == {
        name: row for name, row in before.items() if name != "joint_2stage"
    }
    assert "- joint_2stage/seed1, in joint_2stage/seed1 VLA: error: no disk" in markdown(report)


def test_curves_are_drawn_of_what_cells_with_held_out_episodes_logged(tmp_path):
    study = make_study(tmp_path, "objectives", seeds=1)
    assert write_curves(study) is None
    for number, cell in enumerate(study.cells):
        table = study.metrics(cell)
        table.parent.mkdir(parents=True)
        rows = [{"step": step, "loss/total": 40 / step} for step in (1, 2, 3)]
        rows += [{"step": step, "eval/loss": 1.0, "eval/position_cm": 50 / step + number} for step in (2, 1, 2)]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps, values = read_curve(table, "eval/position_cm")
    assert steps.tolist() == [1, 2] and values.tolist() == [50 + number, 25 + number]
    image = cv2.imread(str(write_curves(study)))
    colors = [tuple(int(color[i : i + 2], 16) for i in (5, 3, 1)) for color in COLORS]
    assert all((image == color).all(-1).any() for color in colors[: len(study.cells)])
    plain = make_study(tmp_path / "plain", "table2")
    assert write_curves(plain) is None


def test_the_chart_shows_a_bar_per_row_and_setting_and_is_written_from_the_same_report(study):
    report = build_report(study)
    write_tables(report)
    image = cv2.imread(str(write_chart(report)))
    colors, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    plain = {tuple(color[::-1]): count for color, count in zip(colors.tolist(), counts, strict=True)}
    assert plain[(0x00, 0x72, 0xB2)] > 5000 and plain[(0xE6, 0x9F, 0x00)] > 5000  # the 2-stage bars of both families


def test_an_evaluation_without_settings_gets_a_panel_per_number_and_a_study_without_results_says_so(tmp_path):
    study = make_study(tmp_path, "fusion", seeds=1, rows=["apt_steps", "apt_nosteps"])
    study.prepare()
    empty = cv2.imread(str(write_chart(build_report(study))))
    for cell in study.cells:
        finish(study, cell, {"position_cm": 2.0 + cell.config.action_step_embedding, "own_number": 7.0})
    report = build_report(study)
    assert "| gated | ✓ | 3.00 | 7.00 |" in markdown(report)
    blue = np.array([0xB2, 0x72, 0x00])  # of the first row, in OpenCV's order; the legend has it too
    with_bars, without = ((image == blue).all(-1) for image in (cv2.imread(str(write_chart(report))), empty))
    for half in np.s_[:, : empty.shape[1] // 2], np.s_[:, empty.shape[1] // 2 :]:
        assert with_bars[half].sum() > without[half].sum() + 5000
