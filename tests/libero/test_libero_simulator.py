"""Demonstrations through the real simulator: converted, replayed, and their poses asked of its segmentation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_utils.h5io import Episode, seal
from examples.libero.control import libero_action
from examples.libero.environment import ROOT, VENV
from tests.libero.make_demos import actions

PYTHON = VENV / "bin/python"

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(
        not any(VENV.glob("lib/python3*/site-packages/libero/libero/assets/scenes")),
        reason="LIBERO or its assets are not there; run: bash examples/libero/setup.sh",
    ),
]


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demos") / "soup_demo.hdf5"
    done = run(PYTHON, "-m", "tests.libero.make_demos", path)
    assert done.stdout.split() == ["0", "True", "1", "False"], done.stderr
    return path


@pytest.fixture(scope="module")
def converted(demos) -> Path:
    out = demos.parent / "out"
    command = ("--src", demos, "--out", out, "--image-size", 96, "--workers", 1)
    done = run(sys.executable, "-m", "data_utils.convert", "libero", *command)
    assert done.returncode == 0, done.stderr
    return out


def test_successful_demonstrations_become_episodes_and_others_are_left_out(converted):
    record = json.loads((converted / "conversion.json").read_text())
    assert record["converted"] == 1
    left_out = {"episode": "libero_object/soup/demo_0001", "reason": "the replay does not end in success"}
    assert record["skipped"] == [left_out]
    assert record["settings"]["simulator"]["mujoco"] == "3.3.2"


def test_an_episode_holds_what_the_demonstration_went_through(converted, demos):
    kept = [0, 1, 2, 4, 6, 7, 8]
    with Episode(converted / "libero_object/soup/demo_0000.h5") as episode, h5py.File(demos) as file:
        assert episode.timestamps.tolist() == list(range(len(kept)))
        assert episode.prompts[0] == "put the soup into the basket" and len(episode.prompts) == 2
        assert set(episode.cameras) == {"agentview", "eye_in_hand"}
        assert episode.rgb("agentview", 0).shape == (96, 96, 3)
        assert episode.attributes["libero_steps_dropped"] == 2
        # Up to the first dropped step the replay is the demonstration, to within rounding to float32.
        np.testing.assert_allclose(episode.world_from_ee[:4, 0], file["data/demo_0/poses"][:4], atol=1e-6)
        for frame, step in enumerate(kept):
            desired, openness = episode.world_from_ee_desired[frame, 0], episode.gripper_desired[frame, 0]
            action = libero_action(desired, openness, episode.world_from_ee[frame, 0])
            np.testing.assert_allclose(action[[0, 1, 2, 6]], actions()[step, [0, 1, 2, 6]], atol=1e-5)
            if actions()[step, 3:6].any():
                np.testing.assert_allclose(action[3:6], actions()[step, 3:6], atol=1e-5)
            else:  # the turn commanded before goes on
                before = episode.world_from_ee_desired[frame - 1, 0, :3, :3]
                np.testing.assert_allclose(desired[:3, :3], before, atol=1e-6)
        assert not np.array_equal(episode.world_from_cam("eye_in_hand", 0), episode.world_from_cam("eye_in_hand", 3))
        assert np.array_equal(episode.world_from_cam("agentview", 0), episode.world_from_cam("agentview", 3))


def test_the_desired_poses_alone_repeat_the_episode(converted, tmp_path):
    done = run(sys.executable, "-m", "examples.libero.replay", "--episodes", converted, "--out", tmp_path / "r.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (outcome,) = json.loads((tmp_path / "r.json").read_text())["episodes"]
    assert outcome["success"] and outcome["deviation"] < 1e-4


@pytest.mark.slow
def test_the_end_effector_projects_into_the_gripper_and_a_mirrored_camera_is_noticed(converted, tmp_path):
    check = (sys.executable, "-m", "examples.libero.check_projection", "--episodes")
    done = run(*check, converted, "--picture", tmp_path / "strip.png")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "strip.png").stat().st_size > 10_000

    wrong = shutil.copy(converted / "libero_object/soup/demo_0000.h5", tmp_path / "wrong.h5")
    with h5py.File(wrong, "a") as file:  # as images turned by 180 degrees would need it
        file["agentview/pose"][:3, :2] *= -1
        seal(file)
    done = run(*check, wrong)
    assert done.returncode == 1 and "agentview: 0/7 frames agree" in done.stdout


@pytest.mark.slow
def test_a_scene_of_every_suite_is_built_stepped_and_rendered():
    done = run(sys.executable, "-m", "examples.libero.check", "--benchmarks", "libero", "libero-pro")
    assert done.returncode == 0 and "12 suites: 12 work\n" in done.stdout, done.stdout + done.stderr
