"""How a lens bends the light: K and distortion from views of a board (Zhang, 2000, as OpenCV's calibrateCamera)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from data_utils.calibrate.views import View
from data_utils.errors import DataError
from data_utils.geometry.pinhole import intrinsics_fault

FEWEST_VIEWS = 8
LEAST_TILT = 15.0  # degrees between the two views whose boards are turned most against each other
LEAST_COVERED = 0.4  # share of the image inside the outline of all corners
LEAST_SURE = 0.02  # standard deviation of the focal length, as a share of it
_OUTLIER = 3.0  # times the median view's error
_OUTLIER_PX = 1.0  # below which no view is one

# Number of coefficients -> OpenCV's flags.
FLAGS = {
    0: cv2.CALIB_ZERO_TANGENT_DIST | cv2.CALIB_FIX_K1 | cv2.CALIB_FIX_K2 | cv2.CALIB_FIX_K3,
    4: cv2.CALIB_FIX_K3,
    5: 0,
    8: cv2.CALIB_RATIONAL_MODEL,
}


@dataclass(frozen=True)
class Lens:
    """What was found.

    Args:
        K: (3, 3).
        distortion: (n,) coefficients.
        px: root mean square over the corners of the views that were used.
        view_px: (N,) the same of every view.
        used: (N,) bool; the others are outliers.
        covered: share of the image inside the outline of all corners.
        focal_sigma: pixels, one standard deviation of the focal length.
    """

    K: np.ndarray
    distortion: np.ndarray
    px: float
    view_px: np.ndarray
    used: np.ndarray
    covered: float
    focal_sigma: float


def find_lens(views: Sequence[View], size: tuple[int, int], coefficients: int) -> Lens:
    """K and distortion.

    Args:
        views: of one camera.
        size: width and height of its pictures.
        coefficients: of the distortion, 0, 4, 5 or 8.
    Raises:
        DataError: the views do not determine them; says what to do.
    """
    if len(views) < FEWEST_VIEWS:
        raise _degenerate(f"the board is in {len(views)} pictures; wanted {FEWEST_VIEWS} or more, better 20")
    covered = coverage(views, size)
    if covered < LEAST_COVERED:
        what = f"the board's corners cover {covered:.0%} of the image, wanted {LEAST_COVERED:.0%} or more"
        raise _degenerate(f"{what}; hold it nearer, and into the image's corners too")
    used = np.ones(len(views), bool)
    while True:
        lens = _calibrated(views, size, coefficients, used, covered)
        most = max(_OUTLIER * float(np.median(lens.view_px[used])), _OUTLIER_PX)
        worst = int(np.argmax(np.where(used, lens.view_px, 0.0)))
        if lens.view_px[worst] <= most or used.sum() <= FEWEST_VIEWS:
            break
        used = used.copy()
        used[worst] = False  # one at a time: it may have spoilt the others
    return lens


def coverage(views: Sequence[View], size: tuple[int, int]) -> float:
    """Share of an image of ``size`` (width, height) inside the outline of all corners."""
    corners = np.concatenate([view.pixels for view in views]).astype(np.float32)
    return float(cv2.contourArea(cv2.convexHull(corners))) / (size[0] * size[1])


def _calibrated(
    views: Sequence[View], size: tuple[int, int], coefficients: int, used: np.ndarray, covered: float
) -> Lens:
    taken = [view for view, use in zip(views, used, strict=True) if use]
    points = [view.points.astype(np.float32) for view in taken]
    pixels = [view.pixels.astype(np.float32) for view in taken]
    try:
        _, K, distortion, turns, _, sigmas, _, errors = cv2.calibrateCameraExtended(
            points, pixels, size, None, None, flags=FLAGS[coefficients]
        )
    except cv2.error as error:
        raise _degenerate("no lens explains these views; tilt the board to different sides in every picture") from error
    _check_tilt(np.stack([cv2.Rodrigues(turn)[0] for turn in turns]))
    focal_sigma = float(np.max(sigmas[:2]))
    if not focal_sigma <= LEAST_SURE * K[0, 0]:
        what = f"the focal length stays uncertain by {focal_sigma / K[0, 0]:.1%}"
        raise _degenerate(f"{what}; tilt the board more, by 20 to 45 degrees to all sides, and hold it nearer")
    if (fault := intrinsics_fault(K[None], size[::-1])) is not None:
        raise _degenerate(f"what comes out {fault[1]}; tilt the board more, and check its YAML")
    distortion = np.ravel(distortion)[:coefficients].astype(np.float64)
    view_px = np.full(len(views), np.nan)
    view_px[used] = np.ravel(errors)
    for index in np.flatnonzero(~used):
        view_px[index] = _view_error(views[index], K, distortion)
    counts = np.array([len(view.points) for view in taken])
    px = float(np.sqrt((counts * view_px[used] ** 2).sum() / counts.sum()))
    return Lens(K, distortion, px, view_px, used, covered, focal_sigma)


def _check_tilt(cam_from_board: np.ndarray) -> None:
    """Boards that are all parallel leave the focal length open, wherever they are."""
    normals = cam_from_board[:, :, 2]
    widest = float(np.degrees(np.arccos(np.clip(normals @ normals.T, -1, 1).min())))
    if widest < LEAST_TILT:
        what = f"the board is held alike in all pictures (it tilts by {widest:.1f} degrees between them)"
        raise _degenerate(f"{what}; wanted {LEAST_TILT:g} or more: tilt it by 20 to 45 degrees, to all sides")


def _view_error(view: View, K: np.ndarray, distortion: np.ndarray) -> float:
    _, turn, shift = cv2.solvePnP(view.points, view.pixels, K, distortion)
    there = cv2.projectPoints(view.points, turn, shift, K, distortion)[0][:, 0]
    return float(np.sqrt(((there - view.pixels) ** 2).sum(-1).mean()))


def _degenerate(what: str) -> DataError:
    return DataError(f"intrinsics: {what}", "intrinsics")
