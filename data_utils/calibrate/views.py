"""Views of a board: its corners in pictures, and where it is before the camera."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from data_utils.calibrate.board import Board
from data_utils.calibrate.pictures import Picture
from data_utils.errors import DataError


@dataclass(frozen=True, eq=False)
class View:
    """``points`` (n, 3) of a board, in metres in its frame, and ``pixels`` (n, 2) at which a picture shows them."""

    name: str
    points: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Views:
    """What a set of pictures shows: views, names of pictures without the board, and the pictures' width and height."""

    views: list[View]
    without: list[str]
    size: tuple[int, int]


def find_views(pictures: Iterable[Picture], board: Board) -> Views:
    """Raises DataError as the pictures do, and where none shows the board."""
    views, without, size = [], [], (0, 0)
    corners = board.corners
    for picture in pictures:
        size = picture.image.shape[1::-1]
        found = board.find(picture.image)
        if found is None:
            without.append(picture.name)
        else:
            views.append(View(picture.name, corners[found[0]], found[1]))
    if not views:
        what = (
            f"a {board.kind} of {board.squares[0]} x {board.squares[1]} squares is in none of {len(without)} pictures"
        )
        raise DataError(f"{what}; is the board's YAML that of this board, and is it sharp and whole?", "image")
    return Views(views, without, (int(size[0]), int(size[1])))


def board_pose(view: View, K: np.ndarray, distortion: np.ndarray) -> np.ndarray:
    """``cam_from_board`` (4, 4) of one view.

    A plane has two poses that look nearly alike (Collins and Bartoli, 2014, OpenCV's IPPE); the better one is refined.
    """
    _, turns, shifts, _ = cv2.solvePnPGeneric(view.points, view.pixels, K, distortion, flags=cv2.SOLVEPNP_IPPE)
    turn, shift = cv2.solvePnPRefineLM(view.points, view.pixels, K, distortion, turns[0], shifts[0])
    return as_pose(np.concatenate([turn.ravel(), shift.ravel()]))


def as_pose(numbers: np.ndarray) -> np.ndarray:
    """(4, 4) of a rotation vector and a position, (6,)."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec(numbers[:3]).as_matrix()
    pose[:3, 3] = numbers[3:]
    return pose


def as_numbers(pose: np.ndarray) -> np.ndarray:
    """Inverse of :func:`as_pose`."""
    return np.concatenate([Rotation.from_matrix(pose[:3, :3]).as_rotvec(), pose[:3, 3]])


def inverse(poses: np.ndarray) -> np.ndarray:
    """Of rigid transforms (..., 4, 4)."""
    out = np.zeros_like(poses)
    out[..., :3, :3] = poses[..., :3, :3].swapaxes(-1, -2)
    out[..., :3, 3] = -(out[..., :3, :3] @ poses[..., :3, 3, None])[..., 0]
    out[..., 3, 3] = 1
    return out


def project_distorted(points: np.ndarray, K: np.ndarray, distortion: np.ndarray) -> np.ndarray:
    """Pixels (n, 2) of points (n, 3) in camera coordinates, through a lens."""
    # What lies behind the camera would come out mirrored, and might even fit.
    before = np.where(points[:, 2:] > 1e-3, points, (10.0, 10.0, 0.1))
    return cv2.projectPoints(before, np.zeros(3), np.zeros(3), K, distortion)[0][:, 0]
