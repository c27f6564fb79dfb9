"""Mistakes in recordings that the format allows: refused by the writer, or remarked on with the number that tells."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_utils.checks.contents import read_contents
from data_utils.checks.unusual import carried_open, find_warnings
from data_utils.errors import DataError
from data_utils.geometry.motion import median_speed, other_orders, turning
from data_utils.h5io import CameraData, EpisodeData, EpisodeWriter, write_episode
from data_utils.inspect.speed import config_of
from data_utils.samples.dataset import H5DatasetMapBase
from data_utils.video import VideoCache
from tests.data.episodes import edited
from tests.data.episodes import write_episode as write_small

T = 12
ROOT = Path(__file__).parents[2]


def remarks(path) -> dict[str, str]:
    return {warning.rule: warning.message for warning in find_warnings(path, VideoCache("pyav"))}


def test_a_file_that_is_there_is_not_written_over_unless_asked_for(tmp_path):
    path = write_small(tmp_path / "a.h5")
    before = path.read_bytes()
    with pytest.raises(DataError, match="is there already; name another one, or give overwrite=True"):
        EpisodeWriter(path, ["front"], 1, "go")
    assert path.read_bytes() == before
    EpisodeWriter(path, ["front"], 1, "go", overwrite=True)


@pytest.mark.parametrize("name", ["a.dat", "a", "a.h5.old"])
def test_a_name_by_which_no_episode_is_found_is_refused(name, tmp_path):
    with pytest.raises(DataError, match="an episode file ends in .h5 or .hdf5"):
        EpisodeWriter(tmp_path / name, ["front"], 1, "go")
    with pytest.raises(DataError, match="an episode file ends in .h5 or .hdf5"):
        write_episode(tmp_path / name, None)


@pytest.mark.parametrize("factor", [1e9, 1e3, 1e-5])
def test_times_in_another_unit_are_remarked_on(factor, tmp_path):
    path = write_small(tmp_path / "a.h5")
    with edited(path) as file:
        file["timestamp"][...] *= factor
        file["ee_pose"][:, :, :3, 3] *= min(factor, 1.0)  # still no faster than a hand
    assert f"has a frame every {0.5 * factor:.4g} s in the median; are times in seconds" in remarks(path)["time"]


def with_wrist_camera(path, hands) -> None:
    """A camera that is fixed to a hand, whose rotations in the file are ``hands(true)``."""
    true = Rotation.from_euler("xyz", np.linspace([170, 5, 10], [200, 30, 60], T), degrees=True)
    world_from_cam = np.tile(np.eye(4), (T, 1, 1))
    world_from_cam[:, :3, :3] = (true * Rotation.from_euler("z", 90, degrees=True)).as_matrix()
    world_from_cam[:, 0, 3] = np.linspace(0, 0.2, T)
    world_from_ee = np.tile(np.eye(4), (T, 1, 1, 1))
    world_from_ee[:, 0, :3, :3] = hands(true)
    frames = [np.zeros((24, 32, 3), np.uint8)] * T
    K = np.array([[30.0, 0, 16], [0, 30, 12], [0, 0, 1]])
    cameras = {"wrist": CameraData(world_from_cam, K, frames)}
    write_episode(path, EpisodeData(np.arange(T) * 0.1, world_from_ee, np.zeros((T, 1)), ["go"], cameras))


def test_a_hands_quaternion_in_another_order_shows_at_its_wrist_camera(tmp_path):
    orders = {
        "as recorded": lambda true: true.as_matrix(),
        "wxyz read as xyzw": lambda true: Rotation.from_quat(np.roll(true.as_quat(), 1, axis=1)).as_matrix(),
        "xyzw read as wxyz": lambda true: Rotation.from_quat(np.roll(true.as_quat(), -1, axis=1)).as_matrix(),
        "of a camera on the head": lambda true: np.tile(np.eye(3), (T, 1, 1)),
    }
    said = {}
    for name, hands in orders.items():
        path = tmp_path / f"{name}.h5"
        with_wrist_camera(path, hands)
        said[name] = remarks(path).get("rotation", "")
    assert said["as recorded"] == said["of a camera on the head"] == ""
    for name in ("wxyz read as xyzw", "xyzw read as wxyz"):
        assert "degrees against every hand, with the numbers of a hand's quaternion in another order by" in said[name]


def test_rotations_of_other_orders_are_each_others_inverse():
    rotations = Rotation.random(20, random_state=0).as_matrix()
    there, back = other_orders(rotations)
    np.testing.assert_allclose(other_orders(there)[1], rotations, atol=1e-9)
    np.testing.assert_allclose(other_orders(back)[0], rotations, atol=1e-9)
    assert turning(rotations, rotations) < 1e-5 < 10 < turning(rotations, there)


def test_the_median_speed_is_of_the_steps_that_move():
    poses = np.tile(np.eye(4), (6, 1, 1))
    poses[3:, 0, 3] = [1.0, 2.0, 3.0]
    assert median_speed(poses, np.arange(6) * 0.5) == pytest.approx(2.0)
    assert median_speed(np.tile(np.eye(4), (3, 1, 1)), np.arange(3.0)) == 0.0


def test_a_gripper_whose_openness_is_the_other_way_round_shows_where_it_carries(tmp_path):
    """On demonstrations that put something into a tray, and on one that ends with what it has lifted."""
    files = sorted((ROOT / "assets" / "episodes").glob("*.hdf5"))
    assert files
    for file in files:
        assert "gripper" not in remarks(file)
        other = tmp_path / file.name
        other.write_bytes(file.read_bytes())
        with edited(other) as opened:
            opened["gripper"][...] = 1 - opened["gripper"][...]
        assert re.search(r"opens at frame \d+, is lifted and closes at frame \d+", remarks(other)["gripper"])
    height = np.array([0.3, 0.2, 0.05, 0.05, 0.2, 0.3])
    assert carried_open(np.array([0.0, 1, 1, 0, 0, 0]), height) is None


def test_a_gripper_that_is_never_more_than_nearly_closed_may_be_a_width(tmp_path):
    path = write_small(tmp_path / "a.h5")
    with edited(path) as file:
        file["gripper"][...] = np.linspace(0.0, 0.08, len(file["gripper"]))[:, None]
    assert "is 0.08 at most, where 1 is open; is it a width in metres?" in remarks(path)["gripper"]


def test_an_episode_whose_next_frame_lies_behind_the_whole_chunk_is_not_trained_on(tmp_path):
    path = write_small(tmp_path / "a.h5")
    config = dataclasses.replace(config_of(read_contents(path, VideoCache("pyav"))), sample_dt=0.5)
    H5DatasetMapBase([path], config).sample(0, np.random.default_rng(0))
    with edited(path) as file:
        file["timestamp"][...] *= 1000  # milliseconds
    with pytest.raises(DataError, match="are timestamp and sample_dt both in seconds") as refused:
        H5DatasetMapBase([path], config).sample(0, np.random.default_rng(0))
    assert refused.value.rule == "time"
