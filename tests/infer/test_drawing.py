"""Trajectories on images and in videos."""

from __future__ import annotations

import av
import numpy as np
import pytest

from data_utils.drawing.captions import TEXT, text_band
from data_utils.drawing.mp4 import VideoWriter
from data_utils.drawing.paths import draw_trajectory, enlarge
from data_utils.geometry.camera import CameraFrame, project
from infer_utils.draw_traj import ARM_COLORS, draw_plan

K = np.array([[100.0, 0, 64], [0, 100.0, 64], [0, 0, 1]])


def test_projection_knows_what_is_behind_the_camera():
    world_from_cam = np.eye(4)
    world_from_cam[2, 3] = -1
    pixels, in_front = project(np.array([[0.1, -0.2, 1.0], [0.0, 0.0, -2.0]]), K, world_from_cam)
    np.testing.assert_allclose(pixels[0], [69, 54])
    assert in_front.tolist() == [True, False]


def test_a_path_is_drawn_where_it_projects_and_the_image_is_left_alone():
    black = np.zeros((64, 64, 3), np.uint8)
    image, scaled = enlarge(black, np.array([[100.0, 0, 32], [0, 100.0, 32], [0, 0, 1]]), 2)
    path = np.stack([[x, 0.1, 1.0] for x in np.linspace(-0.2, 0.2, 5)])
    canvas = draw_trajectory(image, scaled, np.eye(4), path)
    rows, columns = np.nonzero(canvas[..., 0] > 60)
    assert abs(rows.mean() - 2 * 42) < 1 and abs(columns.min() - 2 * 12) <= 3 and abs(columns.max() - 2 * 52) <= 3
    assert not image.any() and not black.any()


def test_points_behind_the_camera_or_far_outside_are_not_drawn():
    path = np.array([[0, 0, -1.0], [1e6, 0, 1.0], [0, 1e6, 0.02]])
    assert not draw_trajectory(np.zeros((64, 64, 3), np.uint8), K, np.eye(4), path).any()


def test_a_closed_gripper_is_drawn_white():
    path = np.array([[0, 0, 1.0], [0.2, 0, 1.0]])
    canvas = draw_trajectory(np.zeros((128, 128, 3), np.uint8), K, np.eye(4), path, np.array([1.0, 0.0]))
    assert tuple(canvas[64, 84]) == (255, 255, 255) and canvas[64, 64, 2] < 100


def test_a_plan_shows_every_arm_in_its_colour_on_every_camera_the_first_sample_thickest():
    poses = np.tile(np.eye(4), (3, 8, 2, 1, 1))
    poses[..., 2, 3] = 1.0
    poses[..., 0, 3] = np.linspace(-0.3, 0.3, 8)[:, None]
    poses[..., 1, 3] = np.array([-0.3, 0.3])  # one arm above the other
    poses[1:, ..., 1, 3] += 0.2 * np.array([[[1.0]], [[0.5]]])
    cameras = {name: CameraFrame(np.zeros((128, 128, 3), np.uint8), K, np.eye(4)) for name in ("front", "left")}
    cameras["wrist"] = CameraFrame(np.zeros((64, 64, 3), np.uint8), K * [[0.5], [0.5], [1]], np.eye(4))
    labelled = draw_plan(cameras, poses, np.ones((3, 8, 2)))
    bands = [text_band(256, [(name, 12, TEXT)]) for name in cameras]
    names = len(bands[0])
    assert np.array_equal(labelled[:names], np.concatenate(bands, axis=1))
    assert (np.abs(labelled[names + 256 :].astype(int) - ARM_COLORS[1]).sum(-1) < 30).any(), "arms are in the legend"
    image = labelled[names : names + 256]
    assert image.shape == (256, 3 * 256, 3) and not cameras["front"].rgb.any()  # small images are enlarged
    for tile in np.split(image, 3, axis=1):
        for arm in range(2):
            last = tile[128 + round(200 * (-0.3, 0.3)[arm]), 128 + 60]
            assert np.abs(last.astype(int) - ARM_COLORS[arm]).max() < 30
    column = image[:, 128].any(-1)
    thickness = np.diff(np.flatnonzero(np.diff(np.concatenate([[False], column, [False]]).astype(int))))[::2]
    assert len(thickness) == 6 and thickness[0] > thickness[1]


def test_a_video_appears_whole_or_not_at_all(tmp_path):
    frames = [np.full((32, 48, 3), 20 * i, np.uint8) for i in range(8)]
    with VideoWriter(tmp_path / "good.mp4", fps=10) as video:
        for frame in frames:
            video.add(frame)
    with av.open(str(tmp_path / "good.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 8 and abs(int(decoded[5].mean()) - 100) < 8
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "bad.mp4") as video:
        video.add(frames[0])
        raise RuntimeError("the episode broke off")
    assert [path.name for path in tmp_path.iterdir()] == ["good.mp4"]
