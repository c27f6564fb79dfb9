"""A camera's pose from a board and a robot's poses, for a camera that stands and for one that an arm carries.

Both are the same problem. With a the frame that the camera is fixed to and b the one that the board is fixed to, every
picture says cam_from_board = cam_from_a @ a_from_b @ b_from_board: the robot gives a_from_b, and the two others are the
same in all pictures. A camera that stands has a = world and b = ee; on an arm, a = ee and b = world.

The start is the closed form of Shah, "Solving the robot-world/hand-eye calibration problem using the Kronecker product"
(2013), of small draws of the pictures, since a single wrong pose spoils it; the best draw is refined on the pixels of
all corners with a loss that outliers do not pull. (OpenCV's own functions for this are not in OpenCV 5.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from data_utils.calibrate.views import View, as_numbers, as_pose, board_pose, inverse, project_distorted
from data_utils.errors import DataError

FEWEST_VIEWS = 6
LEAST_TURN = 10.0  # degrees about a second axis
MOST_OUTLIERS = 0.4  # share of the views
_DRAWS, _DRAWN = 60, 4  # how many draws of how many views
_OUTLIER = 4.0  # times the median view's error
_OUTLIER_PX = 1.0  # below which no view is one
_LOSS_PX = 1.0  # from here on the loss grows with the residual, not its square
_WORST = 0.02  # of the image's width, in the median view: above it, poses and pictures have nothing in common


@dataclass(frozen=True)
class HandEye:
    """What was found.

    Args:
        a_from_cam: (4, 4); ``world_from_cam`` or ``ee_from_cam``.
        b_from_board: (4, 4).
        used: (N,) bool; the other views are outliers.
        view_px, view_mm, view_deg: (N,) residuals of every view: in the image, and of the board's pose.
        halves: millimetres and degrees between what either half of the views alone says; None where they are too few.
    """

    a_from_cam: np.ndarray
    b_from_board: np.ndarray
    used: np.ndarray
    view_px: np.ndarray
    view_mm: np.ndarray
    view_deg: np.ndarray
    halves: tuple[float, float] | None

    def rms(self, values: np.ndarray) -> float:
        """Of (N,) over the views that were used."""
        return float(np.sqrt((values[self.used] ** 2).mean()))


def find_pose(
    views: Sequence[View], a_from_b: np.ndarray, K: np.ndarray, distortion: np.ndarray, size: tuple[int, int]
) -> HandEye:
    """The camera's pose.

    Args:
        views: N of the board.
        a_from_b: (N, 4, 4) of the robot, ``world_from_ee`` for a camera that stands, its inverse for one on the arm.
        K, distortion: of the camera.
        size: width and height of its pictures.
    Raises:
        DataError: too few views, or motions that do not determine the pose; says what to do.
    """
    if len(views) < FEWEST_VIEWS:
        raise _degenerate(f"the board is in {len(views)} pictures; wanted {FEWEST_VIEWS} or more, better 20")
    check_motion(a_from_b)
    problem = _Problem(views, a_from_b, K, distortion)
    used, found = np.ones(len(views), bool), problem.start()
    for _ in range(10):
        found = problem.refine(found, used)
        view_px = problem.view_px(found)
        now = view_px <= max(_OUTLIER * float(np.median(view_px)), _OUTLIER_PX)
        if (now == used).all():
            break
        used = now
    median = float(np.median(view_px))
    if (~used).mean() > MOST_OUTLIERS or median > _WORST * size[0]:
        what = f"the robot's poses do not explain the pictures (half of them are {median:.3g} px off or more)"
        why = "check that poses and pictures belong together, the quaternion's order, metres, and the board's size"
        raise _degenerate(f"{what}; {why}")
    check_motion(a_from_b[used])
    view_mm, view_deg = problem.board_errors(found)
    return HandEye(
        inverse(as_pose(found[:6])), as_pose(found[6:]), used, view_px, view_mm, view_deg, problem.halves(found, used)
    )


def check_motion(a_from_b: np.ndarray) -> None:
    """Raise DataError where the rotations of (N, 4, 4) leave the camera's pose open."""
    first, second = turns(a_from_b)
    if first < LEAST_TURN:
        what = f"the gripper hardly turns between the pictures (by {first:.1f} degrees)"
    elif second < LEAST_TURN:
        what = f"the gripper turns about one axis only (by {second:.1f} degrees about any other)"
    else:
        return
    raise _degenerate(f"{what}; wanted {LEAST_TURN:g} or more about two axes: roll, pitch and yaw it by 20 to 40 each")


def turns(poses: np.ndarray) -> tuple[float, float]:
    """Degrees (N, 4, 4) turn against their middle one: from end to end about the main axis and about a second one."""
    rotations = Rotation.from_matrix(poses[:, :3, :3])
    vectors = (rotations.mean().inv() * rotations).as_rotvec(degrees=True)
    spread = np.linalg.svd(vectors - np.median(vectors, axis=0), full_matrices=False)
    along = vectors @ spread[2].T
    # Without the most extreme tenth on either side, so that no wrong pose speaks for the whole.
    low, high = np.quantile(along, (0.1, 0.9), axis=0)
    widths = np.sort(high - low)[::-1]
    return float(widths[0]), float(widths[1])


class _Problem:
    """Residuals of parameters (12,): cam_from_a and b_from_board, each a rotation vector and a position."""

    def __init__(self, views: Sequence[View], a_from_b: np.ndarray, K: np.ndarray, distortion: np.ndarray) -> None:
        self._a_from_b, self._K, self._distortion = a_from_b, K, distortion
        self._of = np.concatenate([np.full(len(view.points), index) for index, view in enumerate(views)])
        self._points = np.concatenate([view.points for view in views])
        self._pixels = np.concatenate([view.pixels for view in views])
        self._cam_from_board = np.stack([board_pose(view, K, distortion) for view in views])

    def start(self) -> np.ndarray:
        """The best of many draws of views, by the error of the median view."""
        count, rng = len(self._a_from_b), np.random.default_rng(0)
        draws = [np.arange(count)] + [rng.choice(count, _DRAWN, replace=False) for _ in range(_DRAWS)]
        found = [closed_form(self._a_from_b[draw], self._cam_from_board[draw]) for draw in draws]
        return min(found, key=lambda numbers: float(np.median(self.view_px(numbers))))

    def refine(self, numbers: np.ndarray, used: np.ndarray) -> np.ndarray:
        """Least squares over the views ``used`` (N,) bool."""
        rows = used[self._of]
        solved = least_squares(
            lambda changed: self._residuals(changed, rows).ravel(),
            numbers,
            loss="soft_l1",
            f_scale=_LOSS_PX,
            x_scale="jac",
        )
        return solved.x

    def view_px(self, numbers: np.ndarray) -> np.ndarray:
        """(N,) root mean squares."""
        squares = (self._residuals(numbers, slice(None)) ** 2).sum(-1)
        return np.sqrt(np.bincount(self._of, squares) / np.bincount(self._of))

    def board_errors(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) millimetres and degrees between where pictures show the board and where it ought to be."""
        expected = as_pose(numbers[:6]) @ self._a_from_b @ as_pose(numbers[6:])
        return pose_differences(expected, self._cam_from_board)

    def halves(self, numbers: np.ndarray, used: np.ndarray) -> tuple[float, float] | None:
        found, order = [], np.flatnonzero(used)
        if len(order) < 2 * FEWEST_VIEWS:
            return None
        for begin in (0, 1):
            half = np.zeros_like(used)
            half[order[begin::2]] = True
            if min(turns(self._a_from_b[half])) < LEAST_TURN:
                return None
            found.append(inverse(as_pose(self.refine(numbers, half)[:6]))[None])
        mm, deg = pose_differences(*found)
        return float(mm[0]), float(deg[0])

    def _residuals(self, numbers: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
        """(n, 2) pixels."""
        cam_from_board = as_pose(numbers[:6]) @ self._a_from_b @ as_pose(numbers[6:])
        poses = cam_from_board[self._of[rows]]
        points = (poses[:, :3, :3] @ self._points[rows, :, None])[..., 0] + poses[:, :3, 3]
        return project_distorted(points, self._K, self._distortion) - self._pixels[rows]


def closed_form(a_from_b: np.ndarray, cam_from_board: np.ndarray) -> np.ndarray:
    """Parameters (12,) of poses (N, 4, 4) each: Shah's solution of a_from_b @ X = Z @ cam_from_board.

    X is b_from_board, Z a_from_cam. Their rotations are the singular vectors of the sum of Kronecker products that
    belong to its largest singular value; then positions are linear.
    """
    count = len(a_from_b)
    A, B = a_from_b[:, :3, :3], cam_from_board[:, :3, :3]
    # R_A R_X = R_Z R_B, columns stacked: vec(R_Z) = (R_B (x) R_A) vec(R_X).
    product = sum(np.kron(B[i], A[i]) for i in range(count))
    left, _, right = np.linalg.svd(product)
    R_Z, R_X = (_as_rotation(vector.reshape(3, 3, order="F")) for vector in (left[:, 0], right[0]))
    # t_A + R_A t_X = t_Z + R_Z t_B
    matrix = np.concatenate([np.hstack([A[i], -np.eye(3)]) for i in range(count)])
    wanted = np.concatenate([R_Z @ cam_from_board[i, :3, 3] - a_from_b[i, :3, 3] for i in range(count)])
    shifts = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    a_from_cam, b_from_board = np.eye(4), np.eye(4)
    a_from_cam[:3, :3], a_from_cam[:3, 3] = R_Z, shifts[3:]
    b_from_board[:3, :3], b_from_board[:3, 3] = R_X, shifts[:3]
    return np.concatenate([as_numbers(inverse(a_from_cam)), as_numbers(b_from_board)])


def pose_differences(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) millimetres and degrees between poses (N, 4, 4) and (N, 4, 4)."""
    shifts = 1000 * np.linalg.norm(one[:, :3, 3] - other[:, :3, 3], axis=-1)
    turned = Rotation.from_matrix(one[:, :3, :3].swapaxes(-1, -2) @ other[:, :3, :3])
    return shifts, np.degrees(turned.magnitude())


def _as_rotation(matrix: np.ndarray) -> np.ndarray:
    """The nearest rotation to a scaled one, of either sign."""
    left, _, right = np.linalg.svd(matrix * np.sign(np.linalg.det(matrix) or 1.0))
    return left @ np.diag([1, 1, np.linalg.det(left @ right)]) @ right


def _degenerate(what: str) -> DataError:
    return DataError(f"hand-eye calibration: {what}", "pose")
