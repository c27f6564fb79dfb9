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
from apt.ablation.curves import write_curves
from apt.ablation.report import (
    build_report,
    csv_table,
    estimate,
    gain,
    markdown,
    measure_of,
    report_of_results,
    write_tables,
)
from apt.ablation.results import MOST_POINTS, number, read_curve, read_curves
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
        results = [study.result(cell).values for cell in study.cells if cell.row.name == name]
        assert results == [made_up(cell) for cell in study.cells if cell.row.name == name]
        for key in ("position_cm", "language_ratio"):
            assert float(rows[name][key]) == pytest.approx(np.mean([result[key] for result in results]))
        for setting in SETTINGS:
            rates = [np.mean(result[f"{setting}/success"]) for result in results]
            assert float(rows[name][f"{setting}/success"]) == pytest.approx(100 * np.mean(rates))


def test_intervals_over_seeds_are_students_t(study):
    rows = table_rows(build_report(study))
    values = [study.result(cell).values["position_cm"] for cell in study.cells if cell.row.name == "ki_2stage"]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    row = rows["ki_2stage"]
    assert row["position_cm interval"] == "t"
    assert float(row["position_cm low"]) == pytest.approx(low) and float(row["position_cm high"]) == pytest.approx(high)


def test_a_rate_of_one_seed_has_wilsons_interval_and_another_number_none():
    one = estimate("SO/success", [[1, 1, 1, 0, 0, 0, 0, 0, 0, 0]])
    assert one.method == "wilson"
    assert (one.low / 100, one.high / 100) == pytest.approx(wilson_interval(3, 10), abs=1e-6)
    assert estimate("position_cm", [2.0]).low is None


def test_a_rate_that_all_seeds_share_is_not_certain():
    same = estimate("UO/success", [[0] * 10] * 3)
    assert same.method == "wilson" and same.low == 0
    assert same.high / 100 == pytest.approx(wilson_interval(0, 30)[1], abs=1e-6)


def test_rates_stay_between_none_and_all():
    wide = estimate("SO/success", [[0] * 4, [1] * 4])
    assert (wide.low, wide.high, wide.method) == (0.0, 100.0, "t")


def test_the_gain_in_a_number_pairs_the_seeds_of_one_and_two_stages(study):
    found = build_report(study).gain_of("KI").estimates["position_cm"]
    by_name = {cell.name: study.result(cell).values["position_cm"] for cell in study.cells}
    differences = [by_name[f"ki_2stage/seed{s}"] - by_name[f"ki_1stage/seed{s}"] for s in range(3)]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(differences), low, high))


def test_the_gain_in_a_rate_is_judged_by_the_episodes_that_both_rows_share(study):
    found = build_report(study).gain_of("KI").estimates["UC/success"]
    by_name = {cell.name: number(study.result(cell).values["UC/success"]) for cell in study.cells}
    differences = [100 * (by_name[f"ki_2stage/seed{s}"] - by_name[f"ki_1stage/seed{s}"]) for s in range(3)]
    assert found.mean == pytest.approx(np.mean(differences)) and found.method == "bootstrap"
    assert found.low <= found.mean <= found.high
    # Half of the episodes fail alike in both rows: of 40 pairs, ten differ, all in the same direction.
    better, worse = [1] * 20 + [0] * 20, [1] * 10 + [0] * 30
    paired = gain(measure_of("SO/success"), [(better, worse)])
    exact = stats.bootstrap((np.subtract(better, worse),), np.mean, method="percentile", random_state=0)
    assert (paired.low / 100, paired.high / 100) == pytest.approx(tuple(exact.confidence_interval), abs=0.026)

    def difference(a, b, axis):
        return np.mean(a, axis) - np.mean(b, axis)

    apart = stats.bootstrap((better, worse), difference, method="percentile", random_state=0).confidence_interval
    assert paired.high - paired.low < 100 * (apart.high - apart.low), "pairing is what narrows it"


def test_seeds_that_differ_widen_the_interval_of_a_gain():
    alike = [([1] * 20 + [0] * 20, [1] * 10 + [0] * 30)] * 3
    unlike = [([1] * 40, [0] * 40), ([0] * 40, [0] * 40), ([0] * 40, [1] * 10 + [0] * 30)]
    first, second = (gain(measure_of("SO/success"), pairs) for pairs in (alike, unlike))
    assert first.mean == second.mean == pytest.approx(25)
    assert first.low > 0 > second.low and second.high - second.low > 2 * (first.high - first.low)


def test_a_row_may_be_compared_with_one_of_another_family(tmp_path):
    study = make_study(tmp_path, "claim", seeds=1)
    study.prepare()
    for cell in study.cells:
        finish(study, cell)
    gains = {gain.title: gain.row.name for gain in build_report(study).gains}
    assert gains == {
        "VLM trained": "joint_2stage",
        "VLM frozen": "frozen_2stage",
        "VLM frozen, as long as the second stage": "frozen_2stage",
    }


def test_result_files_alone_give_the_same_tables(study, tmp_path):
    report = report_of_results(study.results / study.grid.name)
    assert markdown(report) == markdown(build_report(study))
    assert csv_table(report) == csv_table(build_report(study))
    with pytest.raises(ValueError, match="holds 0 results"):
        report_of_results(tmp_path)


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


def test_curves_are_drawn_of_cells_that_were_evaluated_while_they_trained(tmp_path):
    study = make_study(tmp_path, "objectives", seeds=1)
    study.prepare()
    assert write_curves(build_report(study), tmp_path) is None
    table = tmp_path / "metrics.jsonl"
    for cell_number, cell in enumerate(study.cells):
        rows = [{"step": step, "loss/total": 40 / step} for step in (1, 2, 3)]
        rows += [{"step": step, "eval/loss": 1.0, "eval/position_cm": 50 / step + cell_number} for step in (2, 1, 2)]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        finish(study, cell, curves=read_curves(table))
    steps, values = read_curve(table, "eval/position_cm")
    assert steps.tolist() == [1, 2] and values.tolist() == [50 + cell_number, 25 + cell_number]
    image = cv2.imread(str(write_curves(build_report(study), tmp_path)))
    colors = [tuple(int(color[i : i + 2], 16) for i in (5, 3, 1)) for color in COLORS]
    assert all((image == color).all(-1).any() for color in colors[: len(study.cells)])


def test_a_long_curve_is_thinned_out_and_keeps_its_end(tmp_path):
    table = tmp_path / "metrics.jsonl"
    table.write_text("".join(json.dumps({"step": step, "loss/total": 1 / step}) + "\n" for step in range(1, 1001)))
    steps, values = read_curves(table)["loss/total"]
    assert len(steps) == len(values) <= MOST_POINTS and steps[-1] == 1000 and values[-1] == pytest.approx(1e-3)
    assert read_curves(tmp_path / "nothing.jsonl") == {}


def test_the_chart_shows_a_bar_per_row_and_setting_and_is_written_from_the_same_report(study):
    report = build_report(study)
    write_tables(report, study.folder)
    image = cv2.imread(str(write_chart(report, study.folder)))
    colors, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    plain = {tuple(color[::-1]): count for color, count in zip(colors.tolist(), counts, strict=True)}
    assert plain[(0x00, 0x72, 0xB2)] > 5000 and plain[(0xE6, 0x9F, 0x00)] > 5000  # the 2-stage bars of both families


def test_an_evaluation_without_settings_gets_a_panel_per_number_and_a_study_without_results_says_so(tmp_path):
    study = make_study(tmp_path, "fusion", seeds=1, rows=["apt_steps", "apt_nosteps"])
    study.prepare()
    empty = cv2.imread(str(write_chart(build_report(study), tmp_path)))
    for cell in study.cells:
        finish(study, cell, {"position_cm": 2.0 + cell.config.action_step_embedding, "own_number": 7.0})
    report = build_report(study)
    assert "| gated | ✓ | 3.00 | 7.00 |" in markdown(report)
    blue = np.array([0xB2, 0x72, 0x00])  # of the first row, in OpenCV's order; the legend has it too
    with_bars, without = ((image == blue).all(-1) for image in (cv2.imread(str(write_chart(report, tmp_path))), empty))
    for half in np.s_[:, : empty.shape[1] // 2], np.s_[:, empty.shape[1] // 2 :]:
        assert with_bars[half].sum() > without[half].sum() + 5000
