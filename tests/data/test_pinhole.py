"""One judgement of a camera's matrix: writing, converting, reading, inspecting, planning."""

import logging

import numpy as np
import pytest

from apt.infer.frame_window import FrameWindow
from apt.infer.frames import frame_from_episode, parse_camera
from data_utils.checks.faults import find_faults
from data_utils.errors import DataError
from data_utils.geometry.pinhole import intrinsics_fault, off_centre
from data_utils.h5io import Episode, EpisodeWriter
from tests.convert.datasets import write_v21
from tests.convert.test_lerobot_conversion import MAPPING, content, convert, mapping_file
from tests.data.episodes import camera_pose, config, edited, poses, write_episode

GOOD = [[30.0, 0.0, 16.0], [0.0, 30.0, 12.0], [0.0, 0.0, 1.0]]  # of 24 x 32
BAD = {
    "transposed": (np.transpose(GOOD), "is it transposed"),
    "scaled": (2 * np.array(GOOD), "divided by 2 it is the same camera"),
    "in units of the image": (np.diag([1 / 32, 1 / 24, 1]) @ GOOD, "is it in units of the image's size"),
    "last row of 0": ([*GOOD[:2], [0, 0, 0]], r"last row \[0.0, 0.0, 0.0\]; wanted \[0, 0, 1\]"),
    "sheared": ([[30, 2, 16], [0, 30, 12], [0, 0, 1]], "a sheared image"),
    "mirrored": ([[-30, 0, 16], [0, 30, 12], [0, 0, 1]], "focal lengths -30 and 30"),
    "of another size": ([[300, 0, 160], [0, 300, 120], [0, 0, 1]], r"outside the image of 32 x 24"),
    "not finite": ([[30, 0, np.nan], [0, 30, 12], [0, 0, 1]], "is not finite"),
}


@pytest.fixture(params=BAD)
def bad(request) -> tuple[np.ndarray, str]:
    K, message = BAD[request.param]
    return np.array(K, float), message


def record(path, K, cameras=("front",)) -> None:
    with EpisodeWriter(path, list(cameras), 1, "go") as writer:
        for t in range(3):
            images = {camera: np.zeros((24, 32, 3), np.uint8) for camera in cameras}
            at = {camera: camera_pose(0) for camera in cameras}
            writer.add_frame(float(t), poses(np.array([t]))[0], np.zeros(1), images, at, dict.fromkeys(cameras, K))


def test_it_is_not_written(bad, tmp_path):
    K, message = bad
    with pytest.raises(DataError, match=message) as caught:
        record(tmp_path / "a.h5", K)
    assert caught.value.rule == "intrinsics" and not (tmp_path / "a.h5").exists()


def test_it_is_neither_read_nor_passed_by_inspection(bad, tmp_path):
    K, message = bad
    path = write_episode(tmp_path / "a.h5")
    with edited(path) as file:
        file["wrist/K"][...] = K
    faults = find_faults(path, deep=False)
    assert {fault.rule for fault in faults} == {"intrinsics"} and "wrist/K" in faults[0].message, faults
    with Episode(path) as episode, pytest.raises(DataError, match=message):
        episode.camera_frame("wrist", 1)


def test_it_is_not_planned_with(bad):
    K, message = bad
    camera = {"camera": {"K": K}, "data": {"color": np.zeros((24, 32, 3), np.uint8), "wcT": np.eye(4)}}
    with pytest.raises(ValueError, match=message.replace("is not finite", "holds NaN or infinity")):
        parse_camera("front", camera)


@pytest.mark.parametrize("K", [
    [64, 0, 0, 0, 64, 0, 32, 24, 1],
    [128, 0, 64, 0, 128, 48, 0, 0, 2],
    [1, 0, 0.5, 0, 1.3, 0.5, 0, 0, 1],
    [64, 0, 320, 0, 64, 24, 0, 0, 1],
])  # fmt: skip
def test_it_is_not_converted(K, tmp_path):
    cameras = {name: {**camera, "K": {"form": "matrix", "values": K}} for name, camera in MAPPING["cameras"].items()}
    summary = convert(write_v21(tmp_path / "in", content()), tmp_path / "out", mapping_file(tmp_path, cameras=cameras))
    assert summary.converted == 0 and {fault.rule for fault in summary.failed} == {"intrinsics"}


def test_a_principal_point_outside_the_middle_half_is_a_remark(tmp_path, caplog):
    K = np.array(GOOD)
    K[0, 2] = 27.0
    assert intrinsics_fault(K[None], (24, 32)) is None and off_centre(np.array(GOOD), (24, 32)) is None
    for share in (0.5, 1.5):  # of images of another size
        assert off_centre(np.array(GOOD) * [[share], [share], [1]], (24, 32)) is not None
    assert off_centre(K, (24, 32)) == "principal point (27, 12) is far from the middle of the image of 32 x 24"
    record(tmp_path / "a.h5", K, cameras=("front", "wrist"))
    window = FrameWindow(config())
    with Episode(tmp_path / "a.h5") as episode, caplog.at_level(logging.WARNING):
        for t in range(3):
            window.add([frame_from_episode(episode, t, config())])
    assert [record.args[0] for record in caplog.records] == ["front", "wrist"]  # once each


def test_the_first_bad_one_of_a_moving_zoom_is_named():
    K = np.tile(np.array(GOOD), (5, 1, 1))
    assert intrinsics_fault(K, (24, 32)) is None
    K[3, 0, 0] = K[4, 0, 0] = 0.0
    index, what = intrinsics_fault(K, (24, 32))
    assert index == 3 and "focal lengths 0 and 30" in what
