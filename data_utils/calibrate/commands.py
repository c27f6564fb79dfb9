"""What the sub-commands about boards take and do: read, calibrate, say how good it is, write the rig."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_utils.calibrate import hand_eye, page
from data_utils.calibrate.board import Board, read_board, write_board
from data_utils.calibrate.coverage import coverage_picture
from data_utils.calibrate.intrinsics import find_lens
from data_utils.calibrate.pictures import Picture, read_pictures
from data_utils.calibrate.results import after_lens, arm_of, axis, cameras_of, position, put, some, today, write_png
from data_utils.calibrate.tables import read_poses
from data_utils.calibrate.views import Views, find_views, inverse
from data_utils.cli import CommandLineError, check_writable
from data_utils.data_loc import EPISODE_SUFFIXES
from data_utils.errors import DataError
from data_utils.rig import Residuals, RigCamera
from data_utils.words import counted


@dataclass(frozen=True)
class BoardOptions:
    """Make a board to print, and its YAML beside it."""

    out: Path
    """The page, .pdf or .png; NAME.yaml says what is on it."""
    kind: Literal["charuco", "checkerboard"] = "charuco"
    """A ChArUco board may be seen in part, a checkerboard only whole."""
    squares: tuple[int, int] = (7, 10)
    """Columns and rows of squares."""
    square_mm: float = 25.0
    """Side of a square."""
    marker_mm: float | None = None
    """Side of a marker (default: three quarters of a square)."""
    dictionary: str = "5X5_100"
    """Of the markers, as OpenCV calls it."""
    paper: Literal["a4", "a3", "letter"] = "a4"
    """Size of the page."""

    def run(self) -> None:
        if self.out.suffix not in page.SUFFIXES:
            raise CommandLineError(f"--out is {self.out}; wanted a name that ends in {' or '.join(page.SUFFIXES)}")
        check_writable(self.out.parent, "--out")
        marker = self.marker_mm
        if marker is None:
            marker = round(0.75 * self.square_mm * page.PX_PER_MM) / page.PX_PER_MM
        board = Board(self.kind, self.squares, self.square_mm, marker, self.dictionary)
        drawn = page.draw_page(board, self.paper)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        page.write_page(self.out, drawn)
        write_board(self.out.with_suffix(".yaml"), board)
        size = np.array(board.squares) * board.square_mm
        sheet = np.array(drawn.shape[::-1]) / page.PX_PER_MM
        print(f"wrote {self.out} ({sheet[0]:g} x {sheet[1]:g} mm; the board is {size[0]:g} x {size[1]:g} mm)")
        print(f"wrote {self.out.with_suffix('.yaml')}")
        if not board.has_one_way_up:
            print("it looks the same upside down: good for intrinsics, not for poses; give it one row more for these")


@dataclass(frozen=True)
class IntrinsicsOptions:
    """K and distortion of a camera, from pictures of a board."""

    pictures: Path
    """Folder of pictures, a video, or an episode file."""
    board: Path
    """The board's YAML."""
    camera: str
    """Its name in the rig (and in the episode file)."""
    rig: Path = Path("rig.yaml")
    """File that takes the result; other cameras in it stay."""
    coefficients: Literal[0, 4, 5, 8] = 4
    """Of OpenCV's distortion: none, k1 k2 p1 p2, k3 too, k4 k5 k6 too (wide lenses)."""
    most: int = 80
    """Pictures taken of a video or an episode."""
    coverage: Path | None = None
    """Picture of where the board was seen (default: RIG_CAMERA_coverage.png)."""

    def run(self) -> None:
        check_writable(self.rig.parent, "--rig")
        cameras_of(self.rig)  # one that cannot be read is said before the work
        views = find_views(read_pictures(self.pictures, self.camera, self.most), read_board(self.board))
        _say_found(self.camera, views)
        lens = find_lens(views.views, views.size, self.coefficients)
        outliers = _named(views, lens.used, lens.view_px)
        used, seen = int(lens.used.sum()), len(views.views)
        method = f"intrinsics from {used} of {counted(seen, 'picture')} ({lens.px:.2g} px)"
        method += f", without {outliers}" if outliers else ""
        found = RigCamera(views.size, lens.K, lens.distortion, error=Residuals(lens.px), date=today(), method=method)
        print(f"K: fx {lens.K[0, 0]:.2f}, fy {lens.K[1, 1]:.2f}, cx {lens.K[0, 2]:.2f}, cy {lens.K[1, 2]:.2f}")
        print(f"distortion: {', '.join(f'{value:.5f}' for value in lens.distortion) or 'none'}")
        print(
            f"error {found.error}, focal length +- {lens.focal_sigma:.2g} px, {lens.covered:.0%} of the image covered"
        )
        if outliers:
            print(f"left out: {outliers}")
        coverage = self.coverage or self.rig.with_name(f"{self.rig.stem}_{self.camera}_coverage.png")
        picture = coverage_picture(views.views, lens, views.size, f"{self.camera}: {method}, {found.error}")
        write_png(coverage, picture)
        print(f"wrote {coverage}")
        put(self.rig, self.camera, found)


@dataclass(frozen=True)
class _HandEyeOptions:
    pictures: Path
    """Folder of pictures, or an episode file (which holds the robot's poses too)."""
    board: Path
    """The board's YAML."""
    camera: str
    """Its name in the rig (and in the episode file)."""
    poses: Path | None = None
    """The robot's poses by picture, of a folder: CSV, YAML or JSON."""
    rig: Path = Path("rig.yaml")
    """File that has the camera's intrinsics and takes the result."""
    arm: int = 0
    """Which end-effector of the episodes holds the board, or carries the camera."""
    most: int = 80
    """Pictures taken of an episode."""

    def find(self, carried: bool) -> RigCamera:
        """The camera, placed in the world or on the arm."""
        camera, board, poses = self._read()
        pictures = list(self._pictures(camera))
        views = find_views(pictures, board)
        _say_found(self.camera, views)
        by_name = {picture.name: picture for picture in pictures}
        world_from_ee = np.stack([self._pose_of(by_name[view.name], poses) for view in views.views])
        a_from_b = inverse(world_from_ee) if carried else world_from_ee
        K, distortion = camera.lens(camera.size[::-1], pictures[0].K)
        found = hand_eye.find_pose(views.views, a_from_b, K, distortion, camera.size)
        outliers = _named(views, found.used, found.view_px)
        used, seen = int(found.used.sum()), len(views.views)
        method = f"{'wrist' if carried else 'fixed'}, from {used} of {counted(seen, 'picture')}"
        method += f", without {outliers}" if outliers else ""
        error = Residuals(*(found.rms(values) for values in (found.view_px, found.view_mm, found.view_deg)))
        print(f"error {error}")
        if found.halves is not None:
            print(f"the halves of the pictures differ by {found.halves[0]:.2g} mm and {found.halves[1]:.2g} degrees")
        if outliers:
            print(f"left out: {outliers}")
        placed = (
            {"on_arm": self.arm, "ee_from_cam": found.a_from_cam} if carried else {"world_from_cam": found.a_from_cam}
        )
        nowhere = {"world_from_cam": None, "on_arm": None, "ee_from_cam": None}
        return dataclasses.replace(
            camera, **nowhere | placed, error=error, date=today(), method=after_lens(camera, method)
        )

    def _read(self) -> tuple[RigCamera, Board, dict[str, np.ndarray]]:
        """The camera as the rig has it, the board, and the robot's poses by picture, none of an episode."""
        check_writable(self.rig.parent, "--rig")
        if self.arm < 0:
            raise CommandLineError(f"--arm is {self.arm}; wanted the number of an end-effector, from 0")
        camera = cameras_of(self.rig).get(self.camera)
        if camera is None:
            what = f"{self.rig} has no camera {self.camera!r} yet; run intrinsics for it first, with the same --rig"
            raise DataError(what, "camera")
        board = read_board(self.board)
        if not board.has_one_way_up:
            what = f"{self.board}: a checkerboard of {board.squares[0]} x {board.squares[1]} looks the same upside down"
            raise DataError(f"{what}; wanted an odd sum of columns and rows, or a ChArUco board", "schema")
        is_episode = self.pictures.suffix in EPISODE_SUFFIXES
        if (self.poses is None) != is_episode:
            wanted = "leave --poses out" if is_episode else "give --poses FILE, or an episode file as --pictures"
            whose = "an episode has its own poses" if is_episode else f"{self.pictures} has no poses of the robot"
            raise CommandLineError(f"{whose}; {wanted}")
        return camera, board, {} if self.poses is None else read_poses(self.poses)

    def _pictures(self, camera: RigCamera) -> Iterator[Picture]:
        for picture in read_pictures(self.pictures, self.camera, self.most):
            size = picture.image.shape[1::-1]
            if size != camera.size:
                what = f"{picture.name} is {size[0]} x {size[1]}, the intrinsics of {self.camera} in {self.rig} are of"
                raise DataError(f"{what} {camera.size[0]} x {camera.size[1]}; wanted pictures of that size", "image")
            yield picture

    def _pose_of(self, picture: Picture, poses: dict[str, np.ndarray]) -> np.ndarray:
        """(4, 4) ``world_from_ee``."""
        if picture.world_from_ee is not None:
            return arm_of(picture.world_from_ee, self.arm, self.pictures)
        for name in (picture.name, Path(picture.name).stem):
            if name in poses:
                return poses[name]
        what = f"{self.poses} has no pose of {picture.name}"
        raise DataError(f"{what}; wanted one for every picture that shows the board, by its file's name", "pose")


@dataclass(frozen=True)
class FixedOptions(_HandEyeOptions):
    """The pose of a camera that stands, from pictures of a board in the gripper and the robot's poses."""

    def run(self) -> None:
        camera = self.find(carried=False)
        print(f"world_from_cam: at {position(camera.world_from_cam)}, looks along {axis(camera.world_from_cam)}")
        put(self.rig, self.camera, camera)


@dataclass(frozen=True)
class WristOptions(_HandEyeOptions):
    """The pose of a camera on the arm, from pictures of a board that stands and the robot's poses."""

    def run(self) -> None:
        camera = self.find(carried=True)
        print(f"ee_from_cam: at {position(camera.ee_from_cam)}, looks along {axis(camera.ee_from_cam)} of the gripper")
        put(self.rig, self.camera, camera)


def _say_found(camera: str, views: Views) -> None:
    print(f"{camera}: the board is in {len(views.views)} of {len(views.views) + len(views.without)} pictures")
    if views.without:
        print(f"without it: {some(views.without)}")


def _named(views: Views, used: np.ndarray, view_px: np.ndarray) -> str:
    """Pictures that were left out, with their errors."""
    rows = zip(views.views, used, view_px, strict=True)
    return some([f"{view.name} ({px:.3g} px)" for view, use, px in rows if not use])
