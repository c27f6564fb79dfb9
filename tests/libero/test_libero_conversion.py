"""What of LIBERO's conversion needs no simulator: steps, targets, tasks, files, and finding the interpreter."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_utils.errors import DataError
from examples.errors import SimulatorError
from examples.libero import tasks
from examples.libero.benchmarks import LIBERO_SUITES
from examples.libero.check_projection import bounding_box
from examples.libero.control import libero_action
from examples.libero.convert import LiberoConverter, LiberoSettings, kept_steps, read_demo, set_point
from examples.libero.environment import enter_libero
from examples.libero.tasks import LiberoTask, find_task, read_initial_states, suite_tasks

REPOSITORY = Path(__file__).parents[2]
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
MUGS = "LIVING_ROOM_SCENE5_put_the_white_mug_on_the_left_plate"


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The folder of a LIBERO package that knows two tasks."""
    root = tmp_path / "libero"
    (root / "benchmark").mkdir(parents=True)
    names = {suite: [] for suite in LIBERO_SUITES} | {"libero_object": [SOUP], "libero_10": [MUGS]}
    for suite in names:
        (root / "bddl_files" / suite).mkdir(parents=True)
    (root / "benchmark" / "libero_suite_task_map.py").write_text(f"libero_task_map = {names!r}")
    monkeypatch.setattr(tasks, "libero_root", lambda benchmark: root)
    return root


def write_demos(path: Path, names=("demo_0",), bddl=f"libero_object/{SOUP}.bddl", problem=None, model="<mujoco/>"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["bddl_file_name"] = bddl
        data.attrs["problem_info"] = json.dumps(problem or {"language_instruction": "put the soup away"})
        for name in names:
            demo = data.create_group(name)
            demo["actions"], demo["states"] = np.zeros((4, 7)), np.arange(12.0).reshape(4, 3)
            demo.attrs["model_file"] = model if name == names[0] else f"as {names[0]}"
    return path


# -- steps and targets ------------------------------------------------------------------------------------------------


def test_steps_that_command_nothing_are_dropped_and_gripper_changes_kept():
    still, motion = np.zeros(6), np.array([0.0, 0.0, -0.02, 0.0, 0.0, 0.0])
    actions = np.array(
        [[*still, -1], [*motion, -1], [*still, -1], [*still, 1], [*still, 1], [*motion, 1], [*still, -1]]
    )
    assert kept_steps(actions).tolist() == [1, 3, 5, 6]


def test_a_small_turn_is_a_motion():
    assert kept_steps(np.array([[0, 0, 0, 0, 0, 2e-4, -1], [0, 0, 0, 0, 0, 5e-5, -1]])).tolist() == [0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_the_control_rule_gives_back_the_action_that_a_target_came_from(seed):
    rng = np.random.default_rng(seed)
    world_from_ee = np.eye(4)
    world_from_ee[:3, :3] = Rotation.random(random_state=seed).as_matrix()
    world_from_ee[:3, 3] = rng.normal(size=3)
    action = np.r_[rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0])]
    target, openness = set_point(world_from_ee, action, np.eye(3))
    np.testing.assert_allclose(libero_action(target, openness, world_from_ee), action, atol=1e-9)


def test_a_command_beyond_the_limits_asks_for_no_more_than_the_controller_gives():
    target, _ = set_point(np.eye(4), np.array([5.0, 0, 0, 0, 0, 0, -1]), np.eye(3))
    assert target[0, 3] == pytest.approx(0.05)


def test_an_action_that_does_not_turn_lets_an_earlier_turn_go_on():
    held = Rotation.from_rotvec([0.0, 0.0, 0.3]).as_matrix()
    target, _ = set_point(np.eye(4), np.array([0.5, 0, 0, 0, 0, 0, -1]), held)
    np.testing.assert_array_equal(target[:3, :3], held)
    assert target[0, 3] == pytest.approx(0.025)


@pytest.mark.parametrize(("openness", "command"), [(0.0, 1), (0.8, 1), (0.81, -1), (1.0, -1)])
def test_an_openness_of_at_most_four_fifths_closes_the_gripper(openness, command):
    assert libero_action(np.eye(4), openness, np.eye(4))[6] == command


# -- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named", [f"{SOUP}.bddl", f"chiliocosm/bddl_files/libero_object/{SOUP}.bddl", rf"C:\data\libero\{SOUP}.bddl"]
)
def test_a_goal_file_is_found_wherever_it_once_was(package, named):
    task = find_task(named)
    assert (task.suite, task.task_id) == ("libero_object", 0)
    assert task.bddl_file == package / "bddl_files/libero_object" / f"{SOUP}.bddl"


def test_an_unknown_task_or_suite_is_named(package):
    with pytest.raises(SimulatorError, match="no libero suite has a task 'fold_the_towel'"):
        find_task("x/fold_the_towel.bddl")
    with pytest.raises(SimulatorError, match="no libero suite 'libero_11'; there are libero_spatial"):
        suite_tasks("libero_11")


@pytest.mark.parametrize(
    ("name", "language"),
    [
        (SOUP, "pick up the alphabet soup and place it in the basket"),
        (MUGS, "put the white mug on the left plate"),
        ("KITCHEN_SCENE10_close_the_top_drawer", "close the top drawer"),
    ],
)
def test_the_instruction_is_the_name_without_its_scene(name, language):
    assert LiberoTask("libero_10", 0, name, Path()).language == language


def write_zip(path: Path, content: bytes, name: str = "archive/data.pkl") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def test_initial_states_are_read_without_torch(tmp_path):
    states = np.random.default_rng(0).normal(size=(3, 5))
    path = write_zip(tmp_path / "x.pruned_init", pickle.dumps(states, protocol=2))
    np.testing.assert_array_equal(read_initial_states(path), states)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_initial_states_cannot_run_code_and_unusable_files_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SimulatorError, match=r"h\.pruned_init: holds no initial states.*mkdir"):
        read_initial_states(write_zip(tmp_path / "h.pruned_init", pickle.dumps(Harmful())))
    assert not (tmp_path / "harm").exists()
    (tmp_path / "empty.pruned_init").touch()
    for path in (tmp_path / "empty.pruned_init", tmp_path / "none", write_zip(tmp_path / "o", b"x", "archive/version")):
        with pytest.raises(SimulatorError, match=f"{path.name}: holds no initial states"):
            read_initial_states(path)
    with pytest.raises(SimulatorError, match="holds list; wanted an array"):
        read_initial_states(write_zip(tmp_path / "l", pickle.dumps([1])))


# -- files ------------------------------------------------------------------------------------------------------------


def test_every_demonstration_of_every_file_is_an_episode_named_by_suite_task_and_number(tmp_path):
    write_demos(tmp_path / f"a/{SOUP}_demo.hdf5", ("demo_0", "demo_2", "demo_10"))
    write_demos(tmp_path / f"b/{MUGS}_demo.hdf5", bddl=rf"D:\x\libero_10\{MUGS}.bddl")
    jobs = LiberoConverter(LiberoSettings((tmp_path,))).jobs()
    assert [job.name for job in jobs] == [
        *(f"libero_object/{SOUP}/demo_{number:04d}" for number in (0, 2, 10)),
        f"libero_10/{MUGS}/demo_0000",
    ]
    again = LiberoConverter(LiberoSettings((tmp_path / "a", tmp_path / f"a/{SOUP}_demo.hdf5"))).jobs()
    assert again == jobs[:3]  # a file named twice counts once
    write_demos(tmp_path / f"c/{SOUP}_demo.hdf5")
    with pytest.raises(DataError, match=r"c/.*demo_0 is also in .*a/"):
        LiberoConverter(LiberoSettings((tmp_path,))).jobs()


def test_a_demonstration_brings_its_first_state_its_scene_and_both_wordings(tmp_path, package):
    path = write_demos(tmp_path / "x_demo.hdf5", ("demo_0", "demo_1"))
    for name in ("demo_0", "demo_1"):  # the second refers to the first's scene
        demo = read_demo(path, name)
        assert demo.initial_state.tolist() == [0.0, 1.0, 2.0]
        assert demo.prompts == ["put the soup away", "pick up the alphabet soup and place it in the basket"]
        assert (demo.source, demo.model_xml) == (f"x_demo.hdf5:{name}", "<mujoco/>")


@pytest.mark.parametrize(
    ("language", "prompt"),
    [(["pick", "it", "up"], "pick it up"), ('"pick it up"', "pick it up"), ("", SOUP.replace("_", " "))],
)
def test_instructions_of_old_files_are_understood(tmp_path, package, language, prompt):
    path = write_demos(tmp_path / "x.hdf5", problem={"language_instruction": language})
    assert read_demo(path, "demo_0").prompts[0] == prompt


def test_files_that_are_not_libero_s_are_refused_by_name(tmp_path, package):
    (tmp_path / "text.hdf5").write_text("no")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = 1
    for name in ("text.hdf5", "other.hdf5"):
        with pytest.raises(DataError, match=f"{name}: is not one of LIBERO's HDF5 files"):
            LiberoConverter(LiberoSettings((tmp_path / name,))).jobs()
    with pytest.raises(DataError, match="nowhere: no such HDF5 file"):
        LiberoConverter(LiberoSettings((tmp_path / "nowhere",))).jobs()
    with pytest.raises(DataError, match="--image-size is 4"):
        LiberoConverter(LiberoSettings((tmp_path,), image_size=4))

    path = write_demos(tmp_path / "x.hdf5")
    with h5py.File(path, "a") as file:
        file["data/demo_0/actions"][0, 0] = np.nan
    with pytest.raises(DataError, match="demo_0/actions has shape .* finite") as caught:
        read_demo(path, "demo_0")
    assert caught.value.rule == "schema"
    with h5py.File(path, "a") as file:
        del file["data/demo_0/states"]
    with pytest.raises(DataError, match="demo_0: is not a demonstration of LIBERO"):
        read_demo(path, "demo_0")


def test_the_box_around_a_mask_reaches_its_pixels_far_edges():
    mask = np.zeros((8, 9), bool)
    assert bounding_box(mask) is None
    mask[2, 3] = mask[5, 4] = True
    low, high = bounding_box(mask)
    assert (low.tolist(), high.tolist()) == ([3, 2], [5, 6])


# -- interpreters -----------------------------------------------------------------------------------------------------


def test_a_command_goes_on_in_libero_s_environment_with_its_arguments(tmp_path):
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    program = (
        "import importlib.util as u, runpy, pathlib, examples.libero.environment as e\n"
        f"e.VENV, find = pathlib.Path({str(tmp_path / 'venv')!r}), u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'libero' else find(name, *rest)\n"
        "runpy.run_module('data_utils.convert', run_name='__main__', alter_sys=True)\n"
    )
    arguments = ["libero", "--src", "a b", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == f"-m data_utils.convert libero --src a b --out {tmp_path / 'out'}\n", done.stderr
    assert not (tmp_path / "out").exists()


def test_other_programs_are_told_what_to_set_up():
    with pytest.raises(SimulatorError, match=r"run: bash examples/libero/setup\.sh"):
        enter_libero("data_utils.convert")  # this process is pytest's


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "--assets DIR"),
        (["--asset", "x"], 2, "error: unknown argument --asset"),
        (["--assets", "nowhere"], 1, "error: --assets nowhere: no such folder"),
        (["--assets", "tests"], 1, "error: --assets tests holds no folder 'scenes'; wanted the folder libero"),
        (["--plus-assets", "tests"], 1, "error: --plus-assets tests holds no folder 'scenes'; wanted assets.zip"),
    ],
)  # fmt: skip
def test_the_set_up_says_what_is_wrong_before_it_does_anything(arguments, code, says):
    done = subprocess.run(
        ["bash", "examples/libero/setup.sh", *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == code and says in done.stdout + done.stderr
    assert code == 0 or done.stderr.count("\n") == 1
