"""A camera rig is read as it was written, and everything that takes cameras takes it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from apt.infer.openpi_profile import ProfileReader
from data_utils.calibrate import page
from data_utils.convert.lerobot import LerobotConverter, LerobotSettings
from data_utils.convert.mapping import MappingError
from data_utils.errors import DataError
from data_utils.h5io import Episode, EpisodeWriter
from data_utils.inspect.__main__ import main as inspect
from data_utils.rig import Residuals, RigCamera, read_rig, write_rig
from tests.calibrate import scene
from tests.calibrate.scene import BARREL, BOARD, EE_FROM_CAM, NONE, SIZE, WORLD_FROM_CAM, K
from tests.convert import datasets
from tests.convert.test_lerobot_conversion import MAPPING, arrays, content, convert, mapping_file

SMALL_K = np.array([[40.0, 0.0, 32.0], [0.0, 40.0, 24.0], [0.0, 0.0, 1.0]])  # of 64 x 48


def rig_file(path: Path, distortion=NONE, size=(64, 48), K=SMALL_K) -> Path:
    """The cameras of the LeRobot tests' mapping: one that stands, and one on the arm at twice the size."""
    standing, carried = np.diag([1.0, -1.0, -1.0, 1.0]), np.diag([1.0, -1.0, -1.0, 1.0])
    standing[2, 3], carried[2, 3] = 1.0, -0.1
    cameras = {
        "front": RigCamera(size, K, distortion, world_from_cam=standing),
        "hand": RigCamera((128, 96), np.diag([2, 2, 1]) @ SMALL_K, on_arm=0, ee_from_cam=carried),
    }
    write_rig(path, cameras)
    return path


def in_mapping(name: str, **others) -> dict:
    return {"frames": f"images.{name}", "rig": {"file": "rig.yaml", "camera": name}, **others}


def test_a_rig_is_read_as_it_was_written(tmp_path):
    cameras = {
        "front": RigCamera(
            SIZE, K, BARREL, WORLD_FROM_CAM, None, None, Residuals(0.21, 0.4, 0.03), "2025-01-31", "fixed"
        ),
        "hand": RigCamera(SIZE, K, on_arm=1, ee_from_cam=EE_FROM_CAM, error=Residuals(0.2)),
        "new": RigCamera(SIZE, K),
    }
    write_rig(tmp_path / "rig.yaml", cameras)
    read = read_rig(tmp_path / "rig.yaml")
    for name, camera in cameras.items():
        again = read.camera(name)
        for field in ("K", "distortion", "world_from_cam", "ee_from_cam"):
            one, other = getattr(camera, field), getattr(again, field)
            assert (one is None) == (other is None) and (one is None or np.abs(one - other).max(initial=0) < 1e-8)
        said = ("size", "on_arm", "error", "date", "method")
        assert [getattr(camera, field) for field in said] == [getattr(again, field) for field in said]
    before = (tmp_path / "rig.yaml").read_bytes()
    write_rig(tmp_path / "rig.yaml", read.cameras)
    assert (tmp_path / "rig.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"K": [[1, 2], [3, 4]]}, "line 2: cameras.front: K has shape (2, 2); wanted 3 rows of 3"),
        ({"K": (np.diag([1, 1, 2]) @ K).tolist()}, "K has the last row [0.0, 0.0, 2.0]"),
        ({"distortion": [0.1, 0.2]}, "distortion has 2 numbers; wanted 0, 4, 5 or 8"),
        ({"on_arm": 0}, "wanted world_from_cam, or on_arm with ee_from_cam, or none of them"),
        ({"world_from_cam": (2 * np.eye(4)).tolist()}, "world_from_cam is not a rigid transform"),
        ({"size": [640]}, "size: is [640]; wanted a list of 2"),
        ({"focal": 3}, "has unknown field 'focal'"),
    ],
)
def test_what_is_wrong_in_a_rig_is_said_with_its_line(change, message, tmp_path):
    path = tmp_path / "rig.yaml"
    camera = {"size": [640, 480], "K": K.tolist(), "world_from_cam": WORLD_FROM_CAM.tolist()}
    path.write_text(yaml.safe_dump({"cameras": {"front": camera | change}}, sort_keys=False))
    with pytest.raises(DataError) as caught:
        read_rig(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_an_undistorted_image_is_a_pinhole_cameras():
    placed = scene.before_camera(BOARD, 1, 4, tilt=20, distance=(0.4, 0.4))[0]
    camera = RigCamera(SIZE, K, BARREL)
    image, new_K = camera.undistort(scene.render(BOARD, page._squares(BOARD), placed, BARREL))
    ids, pixels = BOARD.find(image)
    points = BOARD.corners[ids] @ placed[:3, :3].T + placed[:3, 3]
    there = points @ new_K.T
    assert np.abs(pixels - there[:, :2] / there[:, 2:]).max() < 0.6 and len(ids) > 20
    assert camera.is_undistorted(new_K, (480, 640)) and not camera.is_undistorted(K, (480, 640))
    # The image is filled, and no more of it is lost than that takes.
    white, _ = camera.undistort(np.full((480, 640, 3), 255, np.uint8))
    assert white.min() == 255 and 0.6 < new_K[0, 0] / K[0, 0] < 1.4

    half, half_K = camera.undistort(np.zeros((240, 320, 3), np.uint8))
    assert half.shape == (240, 320, 3)
    np.testing.assert_allclose(half_K, np.diag([0.5, 0.5, 1]) @ new_K, rtol=0.02)
    with pytest.raises(DataError, match="is calibrated at 640 x 480, the image is 640 x 360"):
        camera.undistort(np.zeros((360, 640, 3), np.uint8))


def test_a_recorder_gets_its_cameras_from_the_rig(tmp_path):
    rig = read_rig(rig_file(tmp_path / "rig.yaml", distortion=BARREL))
    world_from_ee = np.eye(4)[None].copy()
    world_from_ee[0, 0, 3] = 0.5
    images = {"front": np.full((48, 64, 3), 90, np.uint8), "hand": np.full((96, 128, 3), 90, np.uint8)}
    with EpisodeWriter(tmp_path / "a.h5", list(images), 1, "go") as episode:
        for time in range(2):
            episode.add_frame(time, world_from_ee, np.zeros(1), **rig.frame(images, world_from_ee))
    with Episode(tmp_path / "a.h5") as episode:
        np.testing.assert_allclose(episode.world_from_cam("hand", 0)[:3, 3], [0.5, 0, -0.1], atol=1e-6)
        np.testing.assert_allclose(episode.K("front", 0), rig.camera("front").pinhole((48, 64)), rtol=1e-6)
    with pytest.raises(DataError, match="has no camera 'top'; it has front, hand"):
        rig.frame({"top": images["front"]}, world_from_ee)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return datasets.write_v21(tmp_path_factory.mktemp("lerobot") / "in", content(1, hand_is_image=True))


def test_a_mapping_with_the_rig_converts_as_one_with_its_numbers(source, tmp_path):
    rig_file(tmp_path / "rig.yaml")
    exact = MAPPING["cameras"]["front"] | {"world_from_cam": {"form": "xyz+rotvec", "values": [0, 0, 1, np.pi, 0, 0]}}
    numbers = mapping_file(tmp_path, cameras={**MAPPING["cameras"], "front": exact})
    assert convert(source, tmp_path / "numbers", numbers).failed == []
    by_rig = mapping_file(tmp_path, cameras={name: in_mapping(name) for name in ("front", "hand")})
    assert convert(source, tmp_path / "rig", by_rig, calibration=tmp_path).failed == []
    name = "chunk-000/episode_000000.h5"
    one, other = arrays(tmp_path / "numbers" / name), arrays(tmp_path / "rig" / name)
    assert one.keys() == other.keys()
    for key, value in one.items():
        equal = (
            (value == other[key]).all()
            if value.dtype.kind in "UO"
            else np.abs(value - other[key].astype(float)).max() < 1e-6
        )
        assert equal, key


def test_conversion_undistorts_videos_and_pictures_once(source, tmp_path):
    rig_file(tmp_path / "rig.yaml", distortion=BARREL)
    mapping = mapping_file(tmp_path, cameras={name: in_mapping(name) for name in ("front", "hand")})
    converter = LerobotConverter(LerobotSettings(source, str(mapping), calibration=tmp_path))
    camera = read_rig(tmp_path / "rig.yaml").camera("front")
    made = converter.convert(converter.jobs()[0]).cameras["front"]
    recorded = content(1)[0].videos["images.front"]
    assert len(made.frames) == len(recorded)
    for frame, image in zip(made.frames, recorded, strict=True):
        assert np.abs(frame.astype(int) - camera.undistort(image)[0]).max() <= 3  # a codec's error
    np.testing.assert_array_equal(made.K, camera.pinhole((48, 64)))
    assert convert(source, tmp_path / "out", mapping, calibration=tmp_path).failed == []
    with Episode(tmp_path / "out/chunk-000/episode_000000.h5") as episode:
        assert not episode.is_video("front") and episode.rgb("front", 0).shape == (48, 64, 3)


@pytest.mark.parametrize(
    "camera, message",
    [
        (in_mapping("front", axes="opencv"), "cameras.front: has a rig and axes; the rig says it, leave axes out"),
        ({"frames": "images.front", "axes": "opencv"}, "cameras.front: lacks field 'K'; wanted it, or a rig"),
        ({"frames": "images.front", "rig": {"file": "no.yaml", "camera": "front"}}, "no.yaml, which is not there"),
        ({"frames": "images.front", "rig": {"file": "rig.yaml", "camera": "top"}}, "has no camera 'top'; it has front"),
        ({"frames": "images.front", "rig": {"file": "lens.yaml", "camera": "front"}}, "has no pose yet; python -m"),
    ],
)
def test_a_mapping_whose_rig_does_not_do_is_refused_before_the_work(camera, message, source, tmp_path):
    rig_file(tmp_path / "rig.yaml")
    write_rig(tmp_path / "lens.yaml", {"front": RigCamera((64, 48), SMALL_K)})
    mapping = mapping_file(tmp_path, cameras={"front": camera})
    with pytest.raises(MappingError) as caught:
        LerobotConverter(LerobotSettings(source, str(mapping), calibration=tmp_path)).jobs()
    assert message in str(caught.value)


def test_a_clients_frames_are_undistorted_as_those_of_training(tmp_path):
    rig_file(tmp_path / "rig.yaml", distortion=BARREL)
    profile = {
        "arms": [{"pose": {"form": "xyz+rotvec", "values": "state[0:6]"}}],
        "cameras": {"front": {"frames": "front", "rig": {"file": "rig.yaml", "camera": "front"}}},
    }
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    frame = ProfileReader(str(tmp_path / "profile.yaml")).frame({"state": np.zeros(6), "front": image})
    wanted, new_K = read_rig(tmp_path / "rig.yaml").camera("front").undistort(image)
    np.testing.assert_array_equal(frame["front"]["data"]["color"], wanted)
    np.testing.assert_array_equal(frame["front"]["camera"]["K"], new_K)


def test_inspection_draws_with_the_rig_so_that_a_wrong_calibration_shows(tmp_path, capsys):
    """What is green is the path: beside where it belongs, as the recorded camera is beside the true one."""
    right, shifted = WORLD_FROM_CAM, WORLD_FROM_CAM.copy()
    shifted[:3, 3] += WORLD_FROM_CAM[:3, :3] @ (0.1, 0, 0)
    with EpisodeWriter(tmp_path / "a.h5", ["front"], 1, "wave") as episode:
        for time in range(8):
            world_from_ee = scene.pose((0.3, -0.1 + 0.03 * time, 0.3), (0, 0, 0))
            image = np.full((480, 640, 3), 128, np.uint8)
            episode.add_frame(time, world_from_ee[None], np.ones(1), {"front": image}, {"front": shifted}, {"front": K})
    write_rig(tmp_path / "rig.yaml", {"front": RigCamera(SIZE, K, world_from_cam=right)})
    command = [str(tmp_path / "a.h5"), "--frames", "1", "--workers", "1"]
    assert inspect([*command, "--out", str(tmp_path / "recorded")]) == 0
    capsys.readouterr()
    assert inspect([*command, "--out", str(tmp_path / "rig"), "--rig", str(tmp_path / "rig.yaml")]) == 0
    said = capsys.readouterr().out
    assert "front: recorded 100.0 mm and 0.00 degrees from" in said, said
    columns = {}
    for name in ("recorded", "rig"):
        picture = cv2.imread(str(tmp_path / name / "frames.png"), cv2.IMREAD_COLOR_RGB).astype(int)
        green = (picture[..., 1] > 150) & (picture[..., 0] < 90) & (picture[..., 2] < 110)
        columns[name] = np.flatnonzero(green.any(axis=0)).mean()
    depth = float(np.linalg.norm(WORLD_FROM_CAM[:3, 3] - (0.3, 0, 0.3)))
    assert columns["rig"] - columns["recorded"] == pytest.approx(0.1 * K[0, 0] / depth * 320 / 480, rel=0.3)

    write_rig(tmp_path / "rig.yaml", {"top": RigCamera(SIZE, K, world_from_cam=right)})
    assert inspect([*command, "--out", str(tmp_path / "none"), "--rig", str(tmp_path / "rig.yaml")]) == 2
    assert "wanted a rig with cameras of the episode" in capsys.readouterr().err
