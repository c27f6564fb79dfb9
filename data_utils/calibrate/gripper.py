"""A standing camera's pose from where its pictures show the gripper: no board, recorded episodes alone.

Each mark says that a point of the gripper, whose place the robot knows, is at a pixel. The start is OpenCV's
perspective-n-point on random draws (SQPnP, Terzakis and Lourakis, 2020); all marks are then fitted with a loss that
wrong ones do not pull. Without intrinsics, the focal length is found too: the principal point is taken to be in the
image's middle, and the lens not to distort.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.optimize import least_squares

from data_utils.calibrate.views import as_pose, inverse, project_distorted
from data_utils.errors import DataError

FEWEST_MARKS, FEWEST_FOR_K = 6, 12
LEAST_SPREAD = 0.05  # metres along the second widest direction, and the third where K is found too
LEAST_SURE = 0.05  # standard deviation of the focal length, as a share of it
MOST_OUTLIERS = 0.4
_LOSS_PX = 2.0  # what a hand points with
_OUTLIER, _OUTLIER_PX = 4.0, 6.0  # times the median mark's error; below which no mark is one
_WORST = 0.05  # of the image's width, in the median mark
_FOCALS = np.geomspace(0.4, 4.0, 16)  # times the image's width, where to look first


@dataclass(frozen=True)
class FromGripper:
    """What was found.

    Args:
        world_from_cam: (4, 4).
        K: (3, 3), as given or found.
        used: (N,) bool; the other marks are outliers.
        px, mm, deg: (N,) residuals of every mark: in the image, at the gripper's distance, and of its direction.
        focal_sigma: pixels, one standard deviation of the focal length; None where K was given.
    """

    world_from_cam: np.ndarray
    K: np.ndarray
    used: np.ndarray
    px: np.ndarray
    mm: np.ndarray
    deg: np.ndarray
    focal_sigma: float | None

    def rms(self, values: np.ndarray) -> float:
        """Of (N,) over the marks that were used."""
        return float(np.sqrt((values[self.used] ** 2).mean()))


def find_pose(
    points: np.ndarray, pixels: np.ndarray, K: np.ndarray | None, distortion: np.ndarray, size: tuple[int, int]
) -> FromGripper:
    """The camera's pose.

    Args:
        points: (N, 3) metres in the world.
        pixels: (N, 2) where the images show them.
        K: (3, 3); None: found too.
        distortion: of the lens that K belongs to.
        size: width and height of the images.
    Raises:
        DataError: too few marks, or marks that do not determine the pose; says what to do.
    """
    fewest = FEWEST_FOR_K if K is None else FEWEST_MARKS
    if len(points) < fewest:
        raise _degenerate(f"there are {len(points)} marks; wanted {fewest} or more, better 30")
    _check_spread(points, 2 if K is None else 1)
    fit = _Fit(points, pixels, K, distortion, size)
    numbers, used = fit.start(), np.ones(len(points), bool)
    for _ in range(10):
        numbers, sigma = fit.refine(numbers, used)
        px = fit.errors(numbers)
        now = px <= max(_OUTLIER * float(np.median(px)), _OUTLIER_PX)
        if (now == used).all():
            break
        used = now
    median = float(np.median(px))
    if (~used).mean() > MOST_OUTLIERS or median > _WORST * size[0]:
        what = f"no camera explains the marks (half of them are {median:.3g} px off or more)"
        raise _degenerate(f"{what}; are episodes and frames right, is u to the right and v down, is --point right?")
    _check_spread(points[used], 2 if K is None else 1)
    found_K, cam_from_world = fit.camera(numbers)
    if sigma is not None and sigma > LEAST_SURE * found_K[0, 0]:
        what = f"the focal length stays uncertain by {sigma / found_K[0, 0]:.1%}"
        raise _degenerate(f"{what}; mark frames with the gripper nearer to the camera and further from it, or give K")
    depth = (points @ cam_from_world[:3, :3].T + cam_from_world[:3, 3])[:, 2]
    angle = px / found_K[0, 0]
    mm, deg = 1000 * angle * depth, np.degrees(angle)
    return FromGripper(inverse(cam_from_world), found_K, used, px, mm, deg, sigma)


def spread_frames(positions: np.ndarray, count: int) -> list[int]:
    """Indices of ``count`` of positions (N, 3) that are far from each other, the first the furthest from the middle."""
    distance = np.linalg.norm(positions - positions.mean(axis=0), axis=1)
    chosen = [int(np.argmax(distance))]
    distance = np.linalg.norm(positions - positions[chosen[0]], axis=1)
    while len(chosen) < min(count, len(positions)) and distance.max() > 0:
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(positions - positions[chosen[-1]], axis=1))
    return chosen


def _check_spread(points: np.ndarray, directions: int) -> None:
    """Marks along a line leave the camera's turn about it open, marks in a plane the focal length."""
    widths = np.linalg.svd(points - points.mean(axis=0), compute_uv=False) / np.sqrt(len(points))
    if widths[directions] < LEAST_SPREAD / 2:
        shape = "near one point" if widths[0] < LEAST_SPREAD / 2 else ("along a line", "in a plane")[directions - 1]
        what = f"the marked positions lie {shape} ({1000 * widths[directions]:.0f} mm beside it)"
        raise _degenerate(f"{what}; mark frames with the gripper left and right, high and low, near and far")


class _Fit:
    """Parameters: cam_from_world as a rotation vector and a position, and a focal length's logarithm without K."""

    def __init__(
        self,
        points: np.ndarray,
        pixels: np.ndarray,
        K: np.ndarray | None,
        distortion: np.ndarray,
        size: tuple[int, int],
    ) -> None:
        self._points, self._pixels, self._K, self._size = points, pixels, K, size
        self._distortion = distortion if K is not None else np.zeros(0)

    def start(self) -> np.ndarray:
        """The best of draws, by the median mark's error; without K, over focal lengths."""
        if self._K is not None:
            return self._drawn(np.zeros(0))
        logarithms = np.log(_FOCALS * self._size[0])
        return min((self._drawn(np.array([log])) for log in logarithms), key=self._median)

    def refine(self, numbers: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, float | None]:
        """Least squares over the marks ``used``; and a standard deviation of the focal length in pixels."""
        solved = least_squares(
            lambda changed: self._residuals(changed)[used].ravel(),
            numbers,
            loss="soft_l1",
            f_scale=_LOSS_PX,
            x_scale="jac",
        )
        if self._K is not None:
            return solved.x, None
        residuals, free = self._residuals(solved.x)[used].ravel(), 2 * int(used.sum()) - len(solved.x)
        variance = float((residuals**2).sum()) / free
        sigma = np.sqrt(variance * np.linalg.pinv(solved.jac.T @ solved.jac)[6, 6])
        return solved.x, float(sigma * np.exp(solved.x[6]))

    def errors(self, numbers: np.ndarray) -> np.ndarray:
        """(N,) pixels."""
        return np.linalg.norm(self._residuals(numbers), axis=1)

    def camera(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """K (3, 3) and ``cam_from_world`` (4, 4)."""
        if self._K is not None:
            return self._K, as_pose(numbers[:6])
        focal, (width, height) = float(np.exp(numbers[6])), self._size
        return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]]), as_pose(numbers[:6])

    def _drawn(self, focal: np.ndarray) -> np.ndarray:
        K, _ = self.camera(np.concatenate([np.zeros(6), focal]))
        rng, found = np.random.default_rng(0), []
        draws = [np.arange(len(self._points))]
        draws += [rng.choice(len(self._points), FEWEST_MARKS, replace=False) for _ in range(60)]
        for draw in draws:
            done, turn, shift = cv2.solvePnP(
                self._points[draw], self._pixels[draw], K, self._distortion, flags=cv2.SOLVEPNP_SQPNP
            )
            if done:
                found.append(np.concatenate([turn.ravel(), shift.ravel(), focal]))
        if not found:
            raise _degenerate("no camera explains any few of the marks; mark frames whose grippers are further apart")
        return min(found, key=self._median)

    def _median(self, numbers: np.ndarray) -> float:
        return float(np.median(self.errors(numbers)))

    def _residuals(self, numbers: np.ndarray) -> np.ndarray:
        """(N, 2) pixels."""
        K, cam_from_world = self.camera(numbers)
        points = self._points @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]
        return project_distorted(points, K, self._distortion) - self._pixels


def _degenerate(what: str) -> DataError:
    return DataError(f"from-robot: {what}", "pose")
