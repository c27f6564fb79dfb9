"""The tables of an evaluation: what is averaged over what, how sure it is, and what a reader must be told."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from examples.libero.benchmarks import BENCHMARKS, CATEGORIES
from examples.libero.results import ResultsError, Row, SuiteResults
from examples.libero.summary import main, remarks
from examples.libero.summary_tables import read_runs, tables
from examples.statistics import wilson_interval


def write_results(
    root: Path, suite: str, successes: list[bool], model="apt", benchmark="libero", names=None, **settings
) -> Path:
    """One episode of each task, as the evaluator writes it."""
    settings = {"benchmark": benchmark, "suite": suite, "max_steps": 500, "assets": "LIBERO"} | settings
    with SuiteResults(root / benchmark / suite, model, settings, {"model": model, "skipped_tasks": {}}) as results:
        for task, success in enumerate(successes):
            name = names[task] if names else f"task_{task}"
            results.add(Row(task, 0, success, "do, as told"), task=name)
    return results.csv_file


def test_a_cell_is_the_rate_of_its_suite_and_the_mean_counts_suites_alike(tmp_path):
    for suite, (good, bad) in zip(BENCHMARKS["libero"].suites, ((4, 0), (2, 2), (1, 3), (1, 1)), strict=True):
        write_results(tmp_path, suite, [True] * good + [False] * bad)
    (table,) = tables(read_runs([tmp_path]))
    cells = table.rows["apt"]
    assert [cells[column].rate for column in table.columns] == pytest.approx([1.0, 0.5, 0.25, 0.5, 0.5625])
    assert cells["Object"].interval == wilson_interval(2, 4)
    assert cells["Mean"].episodes == 14
    assert cells["Mean"].interval == wilson_interval(0.5625 * 14, 14)


def test_a_mean_needs_every_suite(tmp_path):
    write_results(tmp_path, "libero_object", [True, False])
    (table,) = tables(read_runs([tmp_path]))
    assert set(table.rows["apt"]) == {"Object"}


def test_results_of_a_part_say_so_and_a_suite_without_episodes_is_blank(tmp_path):
    about = {"model": "apt", "whole_suite": {"tasks": 11, "episodes": 50}, "skipped_tasks": {"10": "no states"}}
    for suite, keys in {"libero_goal": [(0, 0), (0, 1), (1, 0)], "libero_10": []}.items():
        settings = {"benchmark": "libero", "suite": suite}
        with SuiteResults(tmp_path / suite, "apt", settings, about) as results:
            results.write()
            for key in keys:
                results.add(Row(*key, True, "do"), task="task")
    runs = read_runs([tmp_path])
    (table,) = tables(runs)
    assert set(table.rows["apt"]) == {"Goal"}
    assert {run.suite: run.missing for run in runs} == {
        "libero_goal": "2 of 10 tasks, 3 of 500 episodes",
        "libero_10": "0 of 10 tasks, 0 of 500 episodes",
    }
    assert "apt, LIBERO libero_goal: partial, 2 of 10 tasks, 3 of 500 episodes" in remarks(runs)


def test_pro_s_table_has_positions_and_tasks_of_every_suite_as_in_the_paper(tmp_path):
    for suite in BENCHMARKS["libero-pro"].suites:
        write_results(tmp_path, suite, [suite.endswith("swap"), False], benchmark="libero-pro")
    write_results(tmp_path, "libero_object_lan", [True], benchmark="libero-pro")
    (table,) = tables(read_runs([tmp_path]))
    assert table.columns == [
        *("Spatial Pos", "Spatial Task", "Object Pos", "Object Task", "Goal Pos", "Goal Task", "Long Pos", "Long Task"),
        *("Object Language", "Mean Pos", "Mean Task", "Mean"),
    ]
    cells = table.rows["apt"]
    assert (cells["Mean Pos"].rate, cells["Mean Task"].rate, cells["Mean"].rate) == (0.5, 0.0, 0.25)


def test_plus_is_also_told_by_what_was_changed_and_by_difficulty(tmp_path):
    names = ["lift_it_light_1", "lift_it_light_2", "lift_it_add_1", "lift_it_view_0_0_100_0_0_initstate_0_noise_9"]
    write_results(tmp_path, "libero_goal", [True, False, True, False], benchmark="libero-plus", names=names)
    levels = {("libero_goal", name): level for name, level in zip(names, (1, 5, 5, None), strict=True)}
    suites, categories, difficulty = tables(read_runs([tmp_path]), levels)
    assert suites.rows["apt"]["Goal"].rate == 0.5
    assert categories.columns == list(CATEGORIES)
    told = {column: (cell.rate, cell.episodes) for column, cell in categories.rows["apt"].items()}
    assert told == {"Light Conditions": (0.5, 2), "Objects Layout": (1.0, 1), "Sensor Noise": (0.0, 1)}
    assert {column: cell.rate for column, cell in difficulty.rows["apt"].items()} == {"Level 1": 1.0, "Level 5": 0.5}


def test_settings_that_make_rates_incomparable_are_remarked(tmp_path):
    write_results(tmp_path, "libero_goal", [True], seed=0)
    write_results(tmp_path, "libero_goal", [True], model="other", max_steps=300, assets="substitutes", seed=0)
    notes = remarks(read_runs([tmp_path]))
    assert "LIBERO: max_steps differs: 300 (other libero_goal); 500 (apt libero_goal)" in notes
    assert "meshes and textures are not LIBERO's own: substitutes" in notes
    assert not any("seed" in note for note in notes)


def test_two_results_of_one_model_and_suite_are_not_mixed(tmp_path):
    write_results(tmp_path / "a", "libero_goal", [True])
    write_results(tmp_path / "b", "libero_goal", [False])
    with pytest.raises(ResultsError, match="are of the same model and suite"):
        read_runs([tmp_path])
    with pytest.raises(ResultsError, match="no results in"):
        read_runs([tmp_path / "nothing"])


def test_the_command_prints_and_writes_tables_and_a_picture(tmp_path, capsys):
    for model, successes in (("apt", [True, True, False]), ("random", [False, False, False])):
        write_results(tmp_path / "results", "libero_object", successes, model)
    assert main([str(tmp_path / "results"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "66.7 [20.8, 93.9]" in printed and "0.0 [0.0, 56.1]" in printed
    text = (tmp_path / "out/summary.md").read_text()
    assert "| apt |  | 66.7 [20.8, 93.9] |  |  |  |" in text
    with open(tmp_path / "out/summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["column"], float(row["rate"])) for row in rows] == [
        ("apt", "Object", pytest.approx(2 / 3, abs=1e-6)),
        ("random", "Object", 0.0),
    ]
    picture = cv2.imread(str(tmp_path / "out/summary.png"))
    assert picture.shape[1] > 800 and np.ptp(picture) == 255
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_damaged_results_are_named(tmp_path, capsys):
    file = write_results(tmp_path, "libero_goal", [True])
    file.with_suffix(".json").write_text(json.dumps({"settings": {"benchmark": "libero-max", "suite": "x"}}))
    assert main([str(tmp_path)]) == 2
    assert "is of benchmark 'libero-max', which is not known" in capsys.readouterr().err
