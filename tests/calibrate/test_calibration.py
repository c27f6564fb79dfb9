"""Lenses and camera poses are found as they are, wrong pictures are named, and what leaves them open is refused."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_utils.calibrate import gripper, hand_eye, page
from data_utils.calibrate.__main__ import main
from data_utils.calibrate.board import Board, read_board
from data_utils.calibrate.intrinsics import find_lens
from data_utils.calibrate.views import inverse, project_distorted
from data_utils.drawing.mp4 import VideoWriter
from data_utils.errors import DataError
from data_utils.h5io import EpisodeWriter
from data_utils.rig import RigCamera, read_rig, write_rig
from tests.calibrate import scene
from tests.calibrate.scene import (
    BARREL,
    BOARD,
    EE_FROM_CAM,
    NONE,
    SIZE,
    WORLD_FROM_CAM,
    K,
    before_camera,
    pose,
    seen,
    write_poses,
)

WRONG = pose((0.03, 0.02, -0.01), (5, -10, 6))  # what a robot's pose is off by in an outlier
PLACES = {"fixed": (scene.fixed_poses, WORLD_FROM_CAM), "wrist": (scene.wrist_poses, EE_FROM_CAM)}


def apart(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Millimetres and degrees between two poses."""
    mm, deg = hand_eye.pose_differences(one[None], other[None])
    return float(mm[0]), float(deg[0])


def find(kind: str, cam_from_board: np.ndarray, world_from_ee: np.ndarray, **noise) -> hand_eye.HandEye:
    poses = world_from_ee if kind == "fixed" else inverse(world_from_ee)
    return hand_eye.find_pose(seen(BOARD, cam_from_board, BARREL, **noise), poses, K, BARREL, SIZE)


# -- hand-eye -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", PLACES)
def test_a_camera_is_found_well_within_a_millimetre_and_a_tenth_of_a_degree(kind, seed):
    poses_of, true = PLACES[kind]
    cam_from_board = before_camera(BOARD, 20, seed)
    found = find(kind, cam_from_board, poses_of(cam_from_board), noise=0.2, seed=seed)
    mm, deg = apart(found.a_from_cam, true)
    assert mm < 0.2 and deg < 0.02 and found.used.all()
    assert 0.2 < found.rms(found.view_px) < 0.35 and found.rms(found.view_mm) < 2
    assert found.halves[0] < 1.0 and found.halves[1] < 0.1


@pytest.mark.parametrize("kind", PLACES)
def test_wrong_poses_change_nothing_and_are_known(kind):
    poses_of, true = PLACES[kind]
    cam_from_board = before_camera(BOARD, 20, 3)
    poses = poses_of(cam_from_board)
    poses[[4, 13]] = poses[[4, 13]] @ WRONG
    found = find(kind, cam_from_board, poses)
    mm, deg = apart(found.a_from_cam, true)
    assert mm < 0.2 and deg < 0.02 and np.flatnonzero(~found.used).tolist() == [4, 13]


def test_motions_that_leave_the_pose_open_are_refused():
    rng, first = np.random.default_rng(0), before_camera(BOARD, 1, 0)[0]
    shifted = np.stack([pose(rng.uniform(-0.05, 0.05, 3), (0, 0, 0)) @ first for _ in range(12)])
    one_axis = np.stack([first @ pose(rng.uniform(-0.03, 0.03, 3), (0, 0, angle)) for angle in range(-40, 44, 7)])
    for moved, message in (
        (shifted, "hardly turns between the pictures .by 0.0 degrees.; wanted 10 or more about two axes: roll"),
        (one_axis, "turns about one axis only .by 0.0 degrees about any other."),
        (before_camera(BOARD, 5, 0), "the board is in 5 pictures; wanted 6 or more"),
    ):
        for kind, (poses_of, _) in PLACES.items():
            with pytest.raises(DataError, match=message):
                find(kind, moved, poses_of(moved))
    with pytest.raises(DataError, match="do not explain the pictures .* check that poses and pictures belong together"):
        find("fixed", before_camera(BOARD, 12, 0), scene.fixed_poses(before_camera(BOARD, 12, 1)))


def test_the_closed_form_start_is_exact_without_noise():
    cam_from_board = before_camera(BOARD, 6, 0)
    numbers = hand_eye.closed_form(scene.fixed_poses(cam_from_board), cam_from_board)
    assert apart(inverse(hand_eye.as_pose(numbers[:6])), WORLD_FROM_CAM)[0] < 1e-6


# -- intrinsics -----------------------------------------------------------------------------------------------------


def near(count: int, seed: int = 0) -> np.ndarray:
    return before_camera(BOARD, count, seed, tilt=35, distance=(0.3, 0.5))


def test_a_lens_is_found_and_a_bad_picture_is_left_out():
    views = [view for view in seen(BOARD, near(25), BARREL) if len(view.points) > 10]
    views[3].pixels[::2] += 6.0
    lens = find_lens(views, SIZE, 4)
    np.testing.assert_allclose(lens.K, K, atol=4)
    np.testing.assert_allclose(lens.distortion[:2], BARREL[:2], atol=0.03)
    assert np.flatnonzero(~lens.used).tolist() == [3] and lens.px < 0.35 and lens.covered > 0.5


@pytest.mark.parametrize("coefficients, distortion", [(0, NONE), (5, BARREL), (8, BARREL)])
def test_a_lens_has_as_many_coefficients_as_are_asked_for(coefficients, distortion):
    views = [view for view in seen(BOARD, near(25), distortion) if len(view.points) > 10]
    lens = find_lens(views, SIZE, coefficients)
    assert lens.distortion.shape == (coefficients,) and lens.px < 0.3
    np.testing.assert_allclose(lens.K, K, atol=6)


def test_views_that_leave_the_lens_open_are_refused():
    alike = np.repeat(before_camera(BOARD, 1, 0, distance=(0.35, 0.35)), 20, axis=0)
    alike[:, :2, 3] += np.random.default_rng(0).uniform(-0.12, 0.12, (20, 2))
    for poses, message in (
        (near(5), "in 5 pictures; wanted 8 or more"),
        (alike, "held alike in all pictures .* tilt it by 20 to 45 degrees"),
        (middle(), "corners cover"),
    ):
        with pytest.raises(DataError, match=message):
            find_lens([view for view in seen(BOARD, poses, NONE) if len(view.points) > 5], SIZE, 4)


def middle() -> np.ndarray:
    """Boards that stay in the middle of the image."""
    poses = before_camera(BOARD, 12, 0)
    for placed in poses:
        placed[:3, 3] = (0, 0, 0.9) - placed[:3, :3] @ BOARD.corners.mean(axis=0)
    return poses


# -- from the gripper -----------------------------------------------------------------------------------------------


def marks(count: int = 30, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Where grippers are in the world (N, 3), and pixels (N, 2) that a hand marks them at."""
    rng, cam_from_world = np.random.default_rng(2), inverse(WORLD_FROM_CAM)
    points = (0.4, 0.0, 0.25) + rng.uniform(-1, 1, (count, 3)) * (0.2, 0.25, 0.2)
    pixels = project_distorted(points @ cam_from_world[:3, :3].T + cam_from_world[:3, 3], K, NONE)
    return points, pixels + noise * rng.normal(size=pixels.shape)


def test_a_camera_is_found_from_marks_of_the_gripper_and_wrong_ones_are_known():
    points, pixels = marks()
    pixels[[4, 11, 20]] += (40, -25)
    found = gripper.find_pose(points, pixels, K, NONE, SIZE)
    mm, deg = apart(found.world_from_cam, WORLD_FROM_CAM)
    assert mm < 5 and deg < 0.4 and np.flatnonzero(~found.used).tolist() == [4, 11, 20]
    unknown = gripper.find_pose(points, pixels, None, NONE, SIZE)
    assert abs(unknown.K[0, 0] - 609) < 3 * unknown.focal_sigma < 60
    assert apart(unknown.world_from_cam, WORLD_FROM_CAM)[0] < 30


def test_marks_that_leave_the_pose_open_are_refused():
    points, pixels = marks()
    line = points.mean(axis=0) + np.linspace(-0.2, 0.2, 30)[:, None] * (1, 0, 0)
    plane = points * (1, 1, 0)
    for some, known, message in (
        (points[:5], K, "there are 5 marks; wanted 6 or more"),
        (points[:8], None, "there are 8 marks; wanted 12 or more"),
        (line, K, "lie along a line"),
        (plane, None, "lie in a plane"),
        (points[::-1], K, "no camera explains the marks"),
    ):
        with pytest.raises(DataError, match=message):
            gripper.find_pose(some, pixels[: len(some)], known, NONE, SIZE)


# -- boards ---------------------------------------------------------------------------------------------------------


def test_the_page_is_true_to_the_millimetre(tmp_path, capsys):
    assert main(["board", "--out", str(tmp_path / "board.png")]) == 0
    assert "210 x 297 mm; the board is 175 x 250 mm" in capsys.readouterr().out
    with Image.open(tmp_path / "board.png") as image:
        drawn = np.asarray(image)
        np.testing.assert_allclose(image.info["dpi"], 20 * 25.4, rtol=1e-6)
        assert image.size == (210 * 20, 297 * 20)
    board = read_board(tmp_path / "board.yaml")
    ids, pixels = board.find(cv2.resize(drawn, None, fx=0.2, fy=0.2, interpolation=cv2.INTER_AREA))
    assert len(ids) == 54
    millimetres = pixels / 4
    np.testing.assert_allclose(np.diff(millimetres.reshape(9, 6, 2)[..., 0], axis=1), 25, atol=0.02)
    np.testing.assert_allclose(
        millimetres - millimetres[0], 1000 * (board.corners - board.corners[0])[:, :2], atol=0.02
    )

    assert main(["board", "--out", str(tmp_path / "small.pdf"), "--kind", "checkerboard", "--squares", "8", "5"]) == 0
    box = re.search(rb"/MediaBox \[ *0 0 ([\d.]+) ([\d.]+)", (tmp_path / "small.pdf").read_bytes())
    np.testing.assert_allclose([float(side) / 72 * 25.4 for side in box.groups()], (297, 210), atol=0.01)


def test_a_checkerboard_is_found_the_right_way_up_however_it_is_turned():
    board = Board("checkerboard", (8, 5), 25.0, None, None)
    squares = page._squares(board)
    for angle in (0, 90, 180, 250):
        placed = pose((0, 0, 0.5), (12, -15, angle))
        placed[:3, 3] -= placed[:3, :3] @ board.corners.mean(axis=0)
        ids, pixels = board.find(scene.render(board, squares, placed))
        true = project_distorted(board.corners @ placed[:3, :3].T + placed[:3, 3], K, NONE)
        assert np.abs(pixels - true[ids]).max() < 0.5, angle


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--square-mm", "40"], "the board is 280 x 400 mm, a4 has room for"),
        (["--square-mm", "25.03"], "square_mm is 25.03; wanted a multiple of 0.05"),
        (["--dictionary", "9X9_10"], "dictionary is '9X9_10'; wanted one of"),
        (["--squares", "2", "9"], "wanted at least 4 columns and 4 rows"),
    ],
)
def test_a_board_that_cannot_be_printed_is_refused(flags, message, tmp_path, capsys):
    assert main(["board", "--out", str(tmp_path / "board.pdf"), *flags]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


# -- the commands, on rendered pictures -----------------------------------------------------------------------------


COMMON = ["--pictures", "pictures", "--board", "board.yaml"]


def test_pictures_become_a_rig(shot, folder, capsys):
    assert main(["intrinsics", *COMMON, "--camera", "front", "--rig", "new.yaml"]) == 0
    said = capsys.readouterr().out
    assert "the board is in 16 of 16 pictures" in said and "wrote front into new.yaml" in said, said
    lens = read_rig("new.yaml").camera("front")
    np.testing.assert_allclose(lens.K, K, atol=6)
    assert lens.distortion.shape == (4,) and lens.error.px < 0.5 and lens.world_from_cam is None
    with Image.open("new_front_coverage.png") as picture:
        assert picture.width == 960

    for kind, camera in (("fixed", "front"), ("wrist", "hand")):
        poses = PLACES[kind][0](shot[1])
        poses[7] = poses[7] @ WRONG
        write_poses(folder / "poses.csv", poses)
        assert main([kind, *COMMON, "--poses", "poses.csv", "--camera", camera]) == 0
        assert "left out: img_07.png (" in capsys.readouterr().out
    rig = read_rig("rig.yaml")
    assert apart(rig.camera("front").world_from_cam, WORLD_FROM_CAM)[0] < 1.5
    assert apart(rig.camera("hand").ee_from_cam, EE_FROM_CAM)[0] < 1.5 and rig.camera("hand").on_arm == 0
    assert "fixed, from 15 of 16 pictures, without img_07.png" in rig.camera("front").method
    assert rig.camera("front").error.deg < 1

    assert main(["intrinsics", *COMMON, "--camera", "front"]) == 0
    assert (
        "calibrate it again" in capsys.readouterr().out and read_rig("rig.yaml").camera("front").world_from_cam is None
    )


def test_poses_may_come_from_yaml_or_from_an_episode_of_images_distorted_or_not(shot, folder):
    world_from_ee = scene.fixed_poses(shot[1])
    lines = [f"img_{index:02d}: {{matrix: {placed.tolist()}}}" for index, placed in enumerate(world_from_ee)]
    (folder / "poses.yaml").write_text("\n".join(lines))
    assert main(["fixed", *COMMON, "--poses", "poses.yaml", "--camera", "front"]) == 0
    camera = read_rig("rig.yaml").camera("front")
    assert apart(camera.world_from_cam, WORLD_FROM_CAM)[0] < 0.5
    for name, see in (("as_taken.h5", lambda image: (image, K)), ("undistorted.h5", camera.undistort)):
        with EpisodeWriter(name, ["front"], 1, "show the board", jpeg_quality=100) as episode:
            for index, placed in enumerate(world_from_ee):
                image, its_K = see(cv2.imread(f"pictures/img_{index:02d}.png"))
                where = {"front": np.eye(4)}
                episode.add_frame(index, placed[None], np.zeros(1), {"front": image}, where, {"front": its_K})
        assert main(["fixed", "--pictures", name, "--board", "board.yaml", "--camera", "front"]) == 0
        assert apart(read_rig("rig.yaml").camera("front").world_from_cam, WORLD_FROM_CAM)[0] < 1.0


def test_a_video_shows_the_board_as_pictures_do(folder):
    with VideoWriter(Path("board.mp4"), 10) as video:
        for path in sorted(Path("pictures").iterdir()):
            video.add(cv2.imread(str(path)))
    command = ["intrinsics", "--pictures", "board.mp4", "--board", "board.yaml", "--camera", "front", "--most", "14"]
    assert main([*command, "--rig", "new.yaml"]) == 0
    np.testing.assert_allclose(read_rig("new.yaml").camera("front").K, K, atol=10)


def wrong_size(folder: Path) -> None:
    cv2.imwrite("pictures/img_03.png", np.zeros((240, 320, 3), np.uint8))


def no_board(folder: Path) -> None:
    for path in Path("pictures").iterdir():
        cv2.imwrite(str(path), np.zeros((480, 640, 3), np.uint8))


def other_size(folder: Path) -> None:
    write_rig("rig.yaml", {"front": RigCamera((1280, 960), np.diag([2, 2, 1]) @ K)})


def missing_pose(folder: Path) -> None:
    lines = Path("poses.csv").read_text().splitlines()
    Path("poses.csv").write_text("\n".join(line for line in lines if "img_05" not in line))


def no_lens(folder: Path) -> None:
    write_rig("rig.yaml", {"hand": RigCamera(SIZE, K)})


def replaced(name: str, old: str, new: str):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (wrong_size, "pictures: img_03.png is 320 x 240, img_00.png is 640 x 480; wanted pictures of one size"),
        (no_board, "a charuco of 7 x 10 squares is in none of 16 pictures; is the board's YAML that of this board"),
        (other_size, "img_00.png is 640 x 480, the intrinsics of front in rig.yaml are of 1280 x 960"),
        (missing_pose, "poses.csv has no pose of img_05.png; wanted one for every picture"),
        (no_lens, "rig.yaml has no camera 'front' yet; run intrinsics for it first"),
        (replaced("poses.csv", "qw", "w"), "poses.csv: has no column 'qw'; wanted the first line picture,x,y,z,qx"),
        (replaced("poses.csv", "img_01.png", "img_00.png"), "poses.csv, line 3: img_00.png is there twice"),
        (replaced("poses.csv", "img_01.png,", "img_01.png,999"), "is it in millimetres?"),
        (replaced("board.yaml", "charuco", "circles"), "board.yaml, line 2: kind is 'circles'; wanted one of charuco"),
        (
            replaced("board.yaml", "squares: [7, 10]", "squares: [7]"),
            "board.yaml, line 3: squares: is [7]; wanted a list",
        ),
        (replaced("rig.yaml", "K:", "k:"), "rig.yaml, line 5: cameras.front: has unknown field 'k'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(spoil, message, shot, folder, capsys):
    write_poses(folder / "poses.csv", scene.fixed_poses(shot[1]))
    spoil(folder)
    before = Path("rig.yaml").read_bytes()
    assert main(["fixed", *COMMON, "--poses", "poses.csv", "--camera", "front"]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said
    assert Path("rig.yaml").read_bytes() == before


def test_wrong_commands_are_said_in_one_line(folder, capsys):
    for command, message in (
        (["lens"], "unknown sub-command 'lens'; known: board, intrinsics, fixed, wrist, from-robot"),
        (["fixed", *COMMON, "--camera", "front"], "pictures has no poses of the robot; give --poses FILE"),
        (["board", "--out", "board.svg"], "wanted a name that ends in .pdf or .png"),
        (["from-robot", "--episodes", ".", "--camera", "front"], "wanted --frames-to-mark DIR first"),
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said


def test_a_camera_is_found_from_recorded_episodes_and_marked_frames(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    points, pixels = marks(40, noise=0.5)
    tip = np.array([0.0, 0.0, 0.02])
    for episode, rows in (("a", range(20)), ("b", range(20, 40))):
        with EpisodeWriter(f"{episode}.h5", ["front"], 1, "wave") as writer:
            for row in rows:
                world_from_ee = pose(points[row], (7.0 * row, 4, -3.0 * row))
                world_from_ee[:3, 3] -= world_from_ee[:3, :3] @ tip
                image = np.zeros((480, 640, 3), np.uint8)
                writer.add_frame(
                    row, world_from_ee[None], np.zeros(1), {"front": image}, {"front": np.eye(4)}, {"front": K}
                )
    command = ["from-robot", "--episodes", "a.h5", "b.h5", "--camera", "front", "--point", "0", "0", "0.02"]
    assert main([*command, "--frames-to-mark", "frames", "--count", "30"]) == 0
    rows = list(csv.DictReader(Path("frames/marks.csv").open()))
    assert len(rows) == 30 == len(list(Path("frames").glob("*.png"))) and {row["episode"] for row in rows} == {
        "a.h5",
        "b.h5",
    }
    for number, row in enumerate(rows):
        if number != 2:  # hidden
            row["u"], row["v"] = pixels[int(row["frame"]) + (20 if row["episode"] == "b.h5" else 0)]
    with Path("frames/marks.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["episode", "frame", "u", "v"])
        writer.writeheader()
        writer.writerows(rows)

    assert main([*command, "--marks", "frames/marks.csv"]) == 1
    assert "rig.yaml has no camera 'front' with intrinsics; run intrinsics first" in capsys.readouterr().err
    for intrinsics, within in (("episode", 5), ("estimate", 25)):
        assert main([*command, "--marks", "frames/marks.csv", "--intrinsics", intrinsics]) == 0
        camera = read_rig("rig.yaml").camera("front")
        assert apart(camera.world_from_cam, WORLD_FROM_CAM)[0] < within and "from 29 of 29 marks" in camera.method
    assert "K estimated too" in camera.method and abs(camera.K[0, 0] - K[0, 0]) < 20
    assert main([*command, "--frames-to-mark", "frames"]) == 2
